"""The event log, the data set made of it, splits, samples and batches."""
