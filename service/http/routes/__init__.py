"""The routes of the HTTP API, one module per resource, and what their requests and responses share."""
