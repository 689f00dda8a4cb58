"""What an update of the metrics costs: bytes in the tests, times in the report."""
