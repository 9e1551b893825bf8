"""The one family of errors that rayemb raises at its users: what was wrong, where, and what would be right."""


class RayembError(ValueError):
    """Something the user can mend: what was wrong, where it was, what to do.

    `what` is one sentence; `where` names the config key, file, row or URI; `fix` says what would be right.
    Subclasses name the room. The command line prints the three parts and exits with 2.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        parts = [f"{where}: {what}" if where else what]
        if fix:
            parts.append(fix)
        super().__init__(". ".join(part.rstrip(".") for part in parts))

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders on Ray; the default would call __init__ with the joined message alone.
        return _rebuild, (type(self), self.what, self.where, self.fix)


def _rebuild(cls: type[RayembError], what: str, where: str, fix: str) -> RayembError:
    return cls(what, where=where, fix=fix)
