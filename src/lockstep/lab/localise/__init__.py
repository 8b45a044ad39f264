"""Where two runs part: both are run again with probes on, and walked through in the order of execution."""
