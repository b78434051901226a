"""The errors a user can meet. Each message reads: where, what was found, what was expected, what to do."""


class BloomeryError(Exception):
    """Base of every error that the command line prints as one paragraph instead of a traceback."""

    exit_code = 1


class ConfigError(BloomeryError):
    """A setting that cannot be used: unknown key, wrong type, impossible combination."""

    exit_code = 2


class ArtifactError(BloomeryError):
    """A file or directory that is missing, half-written, of the wrong kind or not ours to overwrite."""


class DivergenceError(BloomeryError):
    """Training or evaluation left the region where its numbers mean something."""

    exit_code = 3


class PeerError(BloomeryError):
    """Another process of this run has died, hangs or disagrees; what it did is told by its own error."""


class SandboxError(BloomeryError):
    """Untrusted code cannot be isolated on this machine, so it is not executed."""
