"""How far something long is: a bar on a terminal, a line every tenth in a file."""

from __future__ import annotations

import logging

from tqdm import tqdm

log = logging.getLogger("countdown_kd")


class Bar(tqdm):
    """tqdm's bar. Where nobody looks at a terminal, a line is logged each time another tenth is done."""

    def __init__(self, total: int, desc: str, unit: str, **kwargs):
        self.tenths = 0
        super().__init__(total=total, desc=desc, unit=unit, dynamic_ncols=True, **kwargs)
        if not self.fp.isatty():
            self.leave, self.mininterval, self.miniters, self.dynamic_miniters = False, 0, 1, False

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if self.fp.isatty():
            return super().display(msg, pos)
        tenths = 10 * self.n // max(1, self.total)
        if tenths > self.tenths:
            self.tenths = tenths
            more = f", {self.postfix}" if self.postfix else ""
            log.info("%s: %d of %d %ss%s", self.desc.removesuffix(": "), self.n, self.total, self.unit, more)
        return True

    def close(self) -> None:
        if not self.fp.isatty():
            self.disable = True  # nothing is left to be cleared
        super().close()
