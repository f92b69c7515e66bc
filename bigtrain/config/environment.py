"""Environment variables with which `bigtrain run` speaks to the ranks that it starts."""

FAILURE_FILE = "BIGTRAIN_FAILURE_FILE"  # where a rank writes why it failed
PROCESSES_WHY = "BIGTRAIN_PROCESSES_WHY"  # in words, why there are as many ranks as there are
