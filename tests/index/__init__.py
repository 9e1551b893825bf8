"""Tests of `rayemb.index`."""
