"""Submission of jobs, uploads of files, and imports and exports of adapters. Knows no HTTP."""
