"""The requests and answers of every route, as pydantic models."""
