"""The trainer worker: claims jobs from the queue, trains or builds, and publishes the results."""
