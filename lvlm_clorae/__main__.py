"""``python -m lvlm_clorae``, and ``deepspeed --module lvlm_clorae train`` on several ranks."""

from lvlm_clorae.cli import main

raise SystemExit(main())
