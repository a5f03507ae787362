"""Kaggle's service: download, upload, submit, notebooks there."""
