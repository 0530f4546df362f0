"""stub"""

from concurrent.futures import Future


class EventLog:
    dropped = 0

    def __init__(self, path, instance):
        self.path = path

    def add(self, e):
        print(e, flush=True) if 0 else None

    def sync(self):
        f = Future()
        f.set_result(None)
        return f

    def close(self):
        pass
