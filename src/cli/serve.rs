//! `sublet serve`: the broker and its launcher, for many runs.
//!
//! Forks the launcher, gives up every right, then opens the store and answers on the sockets until it is
//! told to end or the launcher is gone. Nothing here decides.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use super::fail::{Answer, Failure, YES};
use super::{Globals, load};
use crate::api::server::{self, Server};
use crate::broker::metrics::Metrics;
use crate::broker::settle::{self, ServiceManager, Settlement};
use crate::broker::{Beginning, Broker, BrokerError, listeners};
use crate::host::{Host, Places, Trust};
use crate::launcher::client::Launcher;
use crate::model::moment::Span;
use crate::sys::process;

/// Threads for requests that touch the store. Each waits for the disk together with all others.
const BLOCKING_THREADS: usize = 512;

#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct ServeArgs {
    /// Where the sockets are made [default: /run/sublet, for a user $XDG_RUNTIME_DIR/sublet; STATE/run
    /// beside a state directory that is not the default one]
    #[arg(long, value_name = "DIR")]
    pub runtime_dir: Option<PathBuf>,
    /// How long running execs may go on after SIGTERM before they are killed
    #[arg(long, value_name = "DURATION", default_value = "30s")]
    pub drain: Span,
}

const HELP: &str = "\
Examples:
  sublet serve
  sublet runs start --agent reviewer --principal alice --profile default --workspace /srv/agents/a
  curl --unix-socket /run/sublet/control.sock http://localhost/v1/runs

The service wants `workspaces` in [host] of its configuration: it takes a run's workspace only from there.
As root it becomes the user that [host] names, without any capability; the launcher beside it, which holds
no key and decides nothing, keeps what is needed to make sandboxes.

Exit status:
  0    ended as it was told to
  2    could not begin, or lost its launcher (every exec is dead then); systemd starts it anew

Signals:
  SIGTERM, SIGINT  grant nothing more, let execs end for --drain, then kill them; a second one kills at once";

pub fn execute(globals: &Globals, args: ServeArgs) -> Answer {
    let runtime_dir = args.runtime_dir.map(std::path::absolute).transpose().map_err(|e| {
        Failure::new("settle", "runtime_dir_unusable", "cannot use --runtime-dir").because(&e)
    })?;
    let places = Places { runtime_dir, ..load::places(globals) };
    let mut host = Host::load(&places).map_err(|e| Failure::from(&e))?;
    host.trust(Trust::Host);
    let runtime_dir = host.runtime_dir.clone();
    // What the caller left open is not for a service, nor for its launcher.
    let handed = std::env::var("LISTEN_FDS").ok().and_then(|n| n.parse().ok()).unwrap_or(0_u32);
    process::close_range(3_u32.saturating_add(handed), u32::MAX)
        .map_err(|e| state_failure("descriptors_open", &e.into()))?;
    // Both clocks, while they can be looked at.
    load::now()?;
    // Before any thread, and before anything secret is opened.
    let launcher = Launcher::fork(&places, Trust::Host)
        .map_err(|e| Failure::new("settle", "fork_failed", e.to_string()).because_of_source(&e))?;
    server::init_tracing(globals.verbose, globals.json)
        .map_err(|e| Failure::new("settle", "logs_failed", e.to_string()).because_of_source(&e))?;
    let credentials = load::credentials_directory();
    let settlement =
        Settlement { host: &host, runtime_dir: &runtime_dir, credentials: credentials.as_deref() };
    let settled = settle::settle(&settlement).map_err(|e| {
        Failure::new("settle", "settle_failed", e.to_string())
            .because_of_source(&e)
            .hint("`sublet doctor` shows what this host can and cannot do")
    })?;
    let (listeners, changes) = listeners::listeners();
    let metrics = Arc::new(Metrics::new());
    let beginning = Beginning {
        host,
        keys: settled.keys,
        signing: settled.signing,
        listeners,
        metrics: Arc::clone(&metrics),
        posture: serde_json::to_value(&settled.posture).unwrap_or_default(),
    };
    let broker = Arc::new(Broker::begin(beginning, &launcher).map_err(|e| Failure::from(&e))?);
    let server = Server::new(Arc::clone(&broker), settled.control, changes, metrics);

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_name("broker-store")
        .build()
        .map_err(|e| state_failure("runtime_failed", &e))?;
    let (gone, launcher_gone) = tokio::sync::oneshot::channel();
    let keeper = {
        let broker = Arc::clone(&broker);
        move || {
            broker.hold(&launcher);
            // The service may have ended already.
            if gone.send(()).is_err() {
                tracing::debug!("the service had ended before its launcher");
            }
        }
    };
    thread("keeper", keeper)?;
    let sweeper = Arc::clone(&broker);
    let sweeping = thread("sweeper", move || sweeper.sweep())?;
    let revoker = Arc::clone(&broker);
    let revoking = thread("revoker", move || revoker.revoke_minted())?;
    tracing::info!(control = %settled.control_path.display(), uid = settled.posture.uid, "serving");

    let patience = args.drain.0;
    let lost = runtime.block_on(async {
        let (report, mut lost) = tokio::sync::watch::channel(false);
        let stop =
            until_told(Arc::clone(&broker), &settled.manager, patience, launcher_gone, report);
        server::serve(server, stop).await.map_err(|e| {
            Failure::new("settle", "socket_failed", e.to_string()).because_of_source(&e)
        })?;
        Ok::<bool, Failure>(*lost.borrow_and_update())
    })?;
    let stopped = broker.stop();
    sweeping.thread().unpark();
    revoking.thread().unpark();
    if lost {
        return Err(Failure::new(
            "run",
            "launcher_died",
            "the launcher is gone, and with it every exec",
        )
        .hint("look for the kernel's out-of-memory killer; systemd starts the service anew"));
    }
    stopped.map_err(|e| Failure::from(&e))?;
    Ok(YES)
}

/// Ready when nothing is left to wait for: told to end and drained, or without a launcher.
async fn until_told(
    broker: Arc<Broker>,
    manager: &ServiceManager,
    patience: Duration,
    mut launcher_gone: tokio::sync::oneshot::Receiver<()>,
    lost: tokio::sync::watch::Sender<bool>,
) {
    let (terminate, interrupt) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    let (Ok(mut terminate), Ok(mut interrupt)) = (terminate, interrupt) else {
        tracing::error!("could not listen for signals");
        return;
    };
    tell(manager.ready());
    let mut watchdog =
        tokio::time::interval(manager.watchdog().unwrap_or(Duration::from_secs(3600)));
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = &mut launcher_gone => {
                lost.send_replace(true);
                break;
            }
            _ = watchdog.tick() => if manager.watchdog().is_some() { tell(manager.alive()) },
        }
    }
    tell(manager.stopping());
    let patience = if *lost.borrow() { Duration::ZERO } else { patience };
    tracing::info!(seconds = patience.as_secs(), "draining");
    let drained = {
        let broker = Arc::clone(&broker);
        tokio::task::spawn_blocking(move || broker.drain(patience))
    };
    tokio::select! {
        _ = drained => {}
        _ = terminate.recv() => broker.hurry(),
        _ = interrupt.recv() => broker.hurry(),
    }
}

fn tell(told: std::io::Result<()>) {
    if let Err(e) = told {
        tracing::warn!(error = %e, "could not tell the service manager");
    }
}

fn thread(
    name: &str,
    act: impl FnOnce() + Send + 'static,
) -> Result<std::thread::JoinHandle<()>, Failure> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(act)
        .map_err(|e| state_failure("thread_failed", &e))
}

fn state_failure(reason: &str, error: &std::io::Error) -> Failure {
    Failure::new("settle", reason, "could not begin to serve").because(error)
}

impl From<&BrokerError> for Failure {
    fn from(error: &BrokerError) -> Self {
        Failure::new(error.stage(), error.reason(), error.message()).hint(error.hint())
    }
}
