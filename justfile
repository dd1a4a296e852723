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

# Builds a release, runs it with a breakpoint at each of its functions, and writes which ones a start needs.
# As root; after a change of what a start does, or of the compiler. The next release is linked with it.

# Renew the order of functions in a release, `.cargo/hot.ld`.
order:
    python3 benches/order.py

# A tree of SIZE MiB, searched for managed values.

# Measure the guard of containers.
bench-guard SIZE="1024":
    cargo bench --bench guard -- {{SIZE}}

# One leased exec through the broker against the floor and runc; revocation; neighbours; 1,000 live execs;
# 10,000 idle runs; growth over SOAK execs. As root, on an idle machine.

# Measure the broker.
bench-broker SAMPLES="200" SOAK="2000":
    cargo bench --bench broker -- {{SAMPLES}} {{SOAK}}

# Boots Debian's kernels 6.1 and 6.12 under QEMU and tries everything there: vm-tests/README.md. As root; about an
# hour. WORD chooses jobs, and then docs/kernels.md is left alone; `just vm --list` names them.

# Real kernels: isolation, variants, residue, faults; writes docs/kernels.md.
vm *WORDS:
    #!/usr/bin/env bash
    set -euo pipefail
    if [ -z "{{WORDS}}" ]; then set -- --long --report docs/kernels.md; else set -- {{WORDS}}; fi
    cargo test --locked --test vm -- "$@"

# Needs cargo-fuzz (`cargo install --locked cargo-fuzz`) and, for libFuzzer, a C++ compiler (Debian: g++).
# No nightly toolchain: only sanitizers would need one. What it learns stays in fuzz/target/corpus; an input
# that breaks something lands in fuzz/artifacts, and fuzz/README.md says what then.

# Fuzz one target, or all of them, for so many seconds each.
fuzz TARGET="all" SECONDS="60":
    #!/usr/bin/env bash
    set -euo pipefail
    for tool in cargo-fuzz c++; do
        command -v "$tool" >/dev/null || { echo "just fuzz needs $tool: see the justfile" >&2; exit 1; }
    done
    targets={{TARGET}}
    if [ "$targets" = all ]; then targets=$(cargo fuzz list); fi
    for target in $targets; do
        learnt=fuzz/target/corpus/$target
        mkdir -p "$learnt"
        corpus=("$learnt" "fuzz/corpus/$target")
        options=(-max_total_time={{SECONDS}} -timeout=20 -max_len=40000 -print_final_stats=1)
        case $target in
            # The files that users start from.
            profile) corpus+=(profiles) ;;
            seccomp) corpus+=(seccomp) ;;
            # It forks a launcher, so nothing may watch its memory from another thread.
            request) options+=(-rss_limit_mb=0) ;;
        esac
        if [ -e "fuzz/dict/$target" ]; then options+=("-dict=fuzz/dict/$target"); fi
        cargo fuzz run --sanitizer none "$target" "${corpus[@]}" -- "${options[@]}"
    done

# Kills the broker, its launcher or both at hundreds of random moments, and races revocations. SEED repeats
# what an earlier call printed. As root; about five minutes.

# Crash the broker, again and again.
crash SEED="":
    #!/usr/bin/env bash
    set -euo pipefail
    if [ -n "{{SEED}}" ]; then export SUBLET_TEST_SEED={{SEED}}; fi
    SUBLET_LONG_TESTS=1 cargo test --test broker_crash --test broker_races -- --nocapture --test-threads 1
