"""Tests of fastres; helpers are imported as ``from tests.tolerance import ...``."""
