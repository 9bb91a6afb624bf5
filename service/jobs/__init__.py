"""From a request to a job in the queue, and adapters and files on their way in and out. Knows no HTTP."""
