"""What a program sets before torch is imported. This file imports nothing large."""
import os
import signal


def prepare(name):
    """Call this with __name__, before torch is imported. A program that runs as "__main__" then prints no
    traceback at Ctrl-C while torch is imported; support.common.command_line brings Ctrl-C back."""
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")      # a thread that spins long stalls other programs
    # Inductor compiles in this process. Its pool of processes once kept a run waiting for ever.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if name == "__main__":
        signal.signal(signal.SIGINT, signal.SIG_DFL)
