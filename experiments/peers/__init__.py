"""Other people's models on the study's requests, judged by its metrics. See README.md here."""
