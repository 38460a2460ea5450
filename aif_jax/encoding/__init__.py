"""Raw values to features and back: columns, vocabularies, times, hashes, and the one encoder of training and serving."""
