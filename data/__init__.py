"""The data room: token files, the training stream, tokenizers, and one folder per data set. Knows numpy, not torch."""
