"""The command line: `python -m tools.gpu`, which `make gpu` calls."""

from .phases import main

raise SystemExit(main())
