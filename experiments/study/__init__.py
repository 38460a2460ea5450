"""The study behind `experiments.ablation`: data sets, models, recipes, runs, records, report. A run is one trained model."""
