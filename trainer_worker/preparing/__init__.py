"""From a claimed job to a run that can be trained: files, basis, initialization."""
