"""Floor 7: training steps, loops, optimizers and batches."""

from jaxheads.training.batches import lockstep as lockstep
from jaxheads.training.batches import pad_batch as pad_batch
from jaxheads.training.batches import shard_batch as shard_batch
from jaxheads.training.lagrangians import primal_dual as primal_dual
from jaxheads.training.loops import Fitted as Fitted
from jaxheads.training.loops import evaluate as evaluate
from jaxheads.training.loops import fit as fit
from jaxheads.training.optimizers import ftrl as ftrl
from jaxheads.training.processes import abort_on_error as abort_on_error
from jaxheads.training.scaling import DynamicLossScale as DynamicLossScale
from jaxheads.training.state import TrainState as TrainState
from jaxheads.training.steps import StepOutput as StepOutput
from jaxheads.training.steps import make_eval_step as make_eval_step
from jaxheads.training.steps import make_predict_step as make_predict_step
from jaxheads.training.steps import make_train_step as make_train_step
