"""Pieces that several methods are made of; no method is found here."""
