"""Job files for cluster schedulers: written and printed here, submitted by their user."""
