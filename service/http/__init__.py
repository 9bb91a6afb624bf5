"""HTTP: middleware, authentication, errors, event streams and JSON bodies. The routes are in `routes/`."""
