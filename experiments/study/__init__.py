"""The study behind `experiments.ablation`: data sets, arms, recipes, cells, records, report. One cell is one trained model."""
