"""Raw values to features and back: columns, vocabularies, times, and the one encoder of training and serving."""
