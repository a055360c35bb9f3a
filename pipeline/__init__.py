"""The commands: config, run folder, train, cache, evaluate, sample, report. Never looks inside a tensor."""
