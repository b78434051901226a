"""Untrusted programs run here or nowhere."""

from bloomery.verify.sandbox.sandbox import CaseRun, Limits, Sandbox

__all__ = ["CaseRun", "Limits", "Sandbox"]
