"""Bytes under a URL: put, get, list and delete over fsspec, each whole or not at all.

Stands on ``runtime``; no torch. The meaning of the bytes never enters.
"""
