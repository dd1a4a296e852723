# The same recipes at home and in CI.

# What a change must pass before it is looked at.
check:
    cargo fmt --check
    cargo clippy --all-targets -- -D warnings
    @if command -v cargo-deny >/dev/null; then cargo deny check; else echo "cargo deny: not installed (cargo install --locked cargo-deny), skipped"; fi

# The whole suite. As root: most walls stand between two users, and only root can be both.
test *ARGS:
    cargo test {{ARGS}}

# The main job, end to end.
demo:
    cargo run --release --quiet -- demo

# bwrap, sublet without and with a lease, and the floor, interleaved in one run; then what the pure rooms
# and the filters cost. As root, on an idle machine; `just bench 400` takes more samples.

# Measure, side by side, and print ratios with their goals.
bench SAMPLES="200":
    cargo bench --bench bench -- {{SAMPLES}}
    cargo bench --bench pure
    cargo bench --bench seccomp
    cargo bench --bench store
