"""``lvlm-clorae doctor``: check the environment and suggest fixes."""

from lvlm_clorae.arguments import Parser


def main(argv: list[str]) -> int:
    """Print a line for each check. Returns 2 if training cannot start."""
    Parser(prog="lvlm-clorae doctor", description="Check the environment and suggest fixes.").parse_args(argv)
    from lvlm_clorae.doctor import examine

    findings = examine()
    for finding in findings:
        print(f"{finding.state:8} {finding}")
    return 2 if any(finding.state == "missing" for finding in findings) else 0
