"""Other people's models on the study's samples and lists: files of both, score files, one evaluator. See README.md here."""
