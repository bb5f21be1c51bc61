#!/usr/bin/python3
"""Free ports of 127.0.0.1 for a script's servers, on one line: free-ports.py COUNT.

Below those that the kernel gives to clients by itself and those that tests claim (playground/src/port.rs), and anywhere in
between, so that nobody takes one before its server listens.
"""

import random
import socket
import sys

held = []
for number in random.sample(range(10_000, 20_000), 10_000):
    if len(held) == int(sys.argv[1]):
        break
    one = socket.socket()
    try:
        one.bind(("127.0.0.1", number))
    except OSError:
        continue
    held.append(one)
print(*(one.getsockname()[1] for one in held))
