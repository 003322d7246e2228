"""Traces and compilations that run nothing (what a method shares, what a round takes of a pod), and profiles."""
