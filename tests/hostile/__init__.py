"""Canaries in everything that is read: a campaign of planted files, and its test."""
