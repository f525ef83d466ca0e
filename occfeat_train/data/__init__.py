"""From a targets store to batches: which frames, in which order, read by whom."""
