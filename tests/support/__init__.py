"""Fakes, builders and the interpreter that tests share."""
