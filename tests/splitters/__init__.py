"""Tests of llamamoe.splitters."""
