"""Commands: config, run folder, training, token cache, evaluation, sampling, reports. Independent of model code."""
