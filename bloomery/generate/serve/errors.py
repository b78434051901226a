"""Every answer that is not a success, in the shape OpenAI's clients read."""

from typing import Any

_TYPES = {401: "authentication_error", 429: "rate_limit_error", 408: "timeout_error", 504: "timeout_error"}


class ApiError(Exception):
    """A refusal with its HTTP status. `param` names the field at fault, `code` is what programs look at."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object that the client gets."""
        kind = _TYPES.get(self.status) or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """`Retry-After`, where waiting helps."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def invalid(message: str, param: str | None = None, code: str | None = None, status: int = 400) -> ApiError:
    """The request itself is at fault."""
    return ApiError(status, message, param, code)
