//! The request, made whole: configuration, profile, run, command and environment, read once by the
//! broker and checked before anything is decided.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::error::RunError;
use super::ledger::Ledger;
use crate::host::{Host, Places, ProfileRef};
use crate::launcher::wire::{DeliverySpec, GitSpec, Prepare};
use crate::model::digest;
use crate::model::id::{ExecId, RequestId, RunId};
use crate::model::moment::{Moment, Span};
use crate::model::name::{Channel, IdentityName, VariableName};
use crate::model::run::{Run, RunState};
use crate::policy::environment::{self, Context, Given};
use crate::policy::{LeaseFlag, Reason, Request, ResolvedCommand};
use crate::profile::{Capability, NetworkMode, Profile, WorkspaceAccess};
use crate::source::vault::VaultKey;
use crate::sys::clock;

/// What the caller asks for, parsed.
pub struct Asked {
    pub places: Places,
    pub profile: ProfileRef,
    /// Absolute, with every link resolved.
    pub workspace: PathBuf,
    pub leases: Vec<LeaseFlag>,
    pub reason: Option<Reason>,
    pub run_id: Option<RunId>,
    pub agent: IdentityName,
    pub principal: IdentityName,
    /// The command's own environment.
    pub environment: Vec<Given>,
    pub timeout: Option<Span>,
    /// Rows and columns of a terminal for the command.
    pub terminal: Option<(u16, u16)>,
    pub network: Option<NetworkMode>,
    pub command: Vec<OsString>,
}

/// Everything that the later stages read and none of them changes.
pub struct Scene {
    pub host: Host,
    pub profile: Profile,
    pub profile_ref: ProfileRef,
    pub run: Run,
    pub is_new_run: bool,
    pub exec_id: ExecId,
    pub requests: Vec<Request>,
    pub command: Vec<OsString>,
    pub terminal: Option<(u16, u16)>,
    pub timeout: Option<Duration>,
    pub hostname: String,
    pub now: Moment,
    network: Option<NetworkMode>,
    resolved: Option<Resolved>,
    environment: BTreeMap<OsString, OsString>,
    given: Vec<(VariableName, OsString)>,
    home: PathBuf,
}

/// argv[0] as a file.
struct Resolved {
    program: PathBuf,
    found_on_path: bool,
    writable_by_exec: bool,
}

/// The exec among those of this launcher: there is one.
pub const EXEC: u32 = 1;

pub fn set(asked: Asked) -> Result<Scene, RunError> {
    let now = clock::now().map_err(RunError::Clock)?;
    let host = Host::load(&asked.places)?;
    let mut profile = host.profile(&asked.profile)?;
    if let Some(mode) = asked.network {
        profile.narrow_network(mode).map_err(|e| RunError::WouldWiden(e.to_string()))?;
    }
    let home = home();
    let run = Run {
        run_id: asked.run_id.clone().unwrap_or_else(RunId::fresh),
        permissions: host.config.permissions_of(&asked.principal).to_vec(),
        agent: asked.agent,
        principal: asked.principal,
        profile: asked.profile.to_string(),
        workspace: asked.workspace,
        state: RunState::Active,
        started_at: now.wall,
    };
    let request_id = RequestId::fresh();
    let requests: Vec<Request> = asked
        .leases
        .into_iter()
        .map(|flag| flag.into_request(request_id.clone(), run.run_id.clone(), asked.reason.clone()))
        .collect();
    let given = asked.environment.iter().map(|g| (g.name.clone(), g.value.clone())).collect();
    let environment = {
        // By what is asked for, since nothing is granted yet; a denial comes before any of it matters.
        let leased = requests.iter().filter_map(|r| {
            let capability: &Capability = profile.capability(&r.capability)?;
            Some((capability, r.channel.or(capability.channels.first().copied())?))
        });
        let context = Context::new(&profile, leased);
        let invoker = |name: &VariableName| std::env::var_os(name.as_str());
        environment::compose(&context, asked.environment, invoker, &home)?
    };
    let resolved = match requests.is_empty() {
        true => None,
        false => resolve(&profile, &run.workspace, &home, &asked.command[0]),
    };
    let timeout = [asked.timeout, profile.limits.timeout].into_iter().flatten().min().map(|s| s.0);
    Ok(Scene {
        host,
        profile_ref: asked.profile,
        is_new_run: asked.run_id.is_none(),
        run,
        exec_id: ExecId::fresh(),
        requests,
        command: asked.command,
        terminal: asked.terminal,
        timeout,
        hostname: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        now,
        network: asked.network,
        resolved,
        environment,
        given,
        home,
        profile,
    })
}

impl Scene {
    /// The command as the policy judges it.
    pub fn resolved(&self) -> Option<ResolvedCommand<'_>> {
        self.resolved.as_ref().map(|r| ResolvedCommand {
            argv: &self.command,
            program: &r.program,
            found_on_path: r.found_on_path,
            writable_by_exec: r.writable_by_exec,
        })
    }

    /// The order for the launcher. Which delivery goes where follows from the profile alone; what is not
    /// granted is never filled or started.
    pub fn prepare(&self) -> Prepare {
        let deliveries = self.requests.iter().filter_map(|request| {
            let capability = self.profile.capability(&request.capability)?;
            let audience = capability.audience(&request.audience)?;
            let channel = request.channel.or(capability.channels.first().copied())?;
            let git = (channel == Channel::Git).then(|| GitSpec {
                protocol: audience.protocol.as_ref().map_or("https", |p| p.as_str()).to_owned(),
                host: audience.host.clone(),
            });
            Some(DeliverySpec { channel, variable: audience.delivery_name()?, git })
        });
        let pinned = self
            .requests
            .iter()
            .any(|r| self.profile.capability(&r.capability).is_some_and(|c| !c.is_any_command()));
        let program = self.resolved.as_ref().filter(|_| pinned).map(|r| r.program.clone());
        Prepare {
            exec: EXEC,
            exec_id: self.exec_id.clone(),
            run_id: self.run.run_id.clone(),
            profile: self.profile_ref.clone(),
            workspace: self.run.workspace.clone(),
            argv: self.command.iter().map(|a| a.as_bytes().to_vec()).collect(),
            program,
            environment: self
                .environment
                .iter()
                .filter_map(|(name, value)| {
                    let name = name.to_str()?.parse().ok()?;
                    Some((name, value.clone().into_vec()))
                })
                .collect(),
            without_network: self.network == Some(NetworkMode::None),
            terminal: self.terminal,
            deliveries: deliveries.collect(),
            home: Some(self.home.clone()),
        }
    }

    /// A managed value must not come in by the back door. Compared by keyed digest.
    pub fn refuse_managed_values(&self, ledger: &Ledger) -> Result<(), RunError> {
        if self.given.is_empty() {
            return Ok(());
        }
        let managed = ledger.digests()?;
        if managed.is_empty() {
            return Ok(());
        }
        let credentials = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
        let key = VaultKey::load(&self.host.state_dir, credentials.as_deref())
            .map_err(super::value::unavailable_vault)?;
        for (name, value) in &self.given {
            if let Some(secret) = digest::matching(&key.digest(value.as_bytes()), &managed) {
                return Err(RunError::ManagedValue { name: name.clone(), secret: secret.clone() });
            }
        }
        Ok(())
    }
}

/// The invoker's home: HOME, where it is a directory's absolute path.
fn home() -> PathBuf {
    std::env::var_os("HOME")
        .map(PathBuf::from)
        .filter(|p| p.is_absolute() && p != Path::new("/"))
        .unwrap_or_else(|| PathBuf::from("/nonexistent"))
}

/// Finds argv[0] as the exec will: on the profile's PATH, or in the workspace.
fn resolve(profile: &Profile, workspace: &Path, home: &Path, name: &OsStr) -> Option<Resolved> {
    let image = profile.filesystem.root.as_ref().map(|r| r.resolve(home));
    let on_host = |inside: &Path| match &image {
        Some(image) => image.join(inside.strip_prefix("/").unwrap_or(inside)),
        None => inside.to_owned(),
    };
    let is_program = |inside: &Path| {
        std::fs::metadata(on_host(inside))
            .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    };
    let path: Vec<_> = profile.environment.path.iter().map(|d| d.resolve(home)).collect();
    let first_on_path = |name: &OsStr| path.iter().map(|d| d.join(name)).find(|p| is_program(p));
    let (program, found_on_path) = if name.as_bytes().contains(&b'/') {
        let program = workspace.join(name);
        let first = program.file_name().and_then(first_on_path);
        let found = first.is_some_and(|first| first == program);
        (program, found)
    } else {
        (first_on_path(name)?, true)
    };
    let mut writable = vec![PathBuf::from("/tmp"), PathBuf::from("/dev/shm")];
    writable.push(profile.filesystem.home.resolve(home));
    writable.extend(profile.filesystem.read_write.iter().map(|e| e.path.resolve(home)));
    if profile.filesystem.workspace == WorkspaceAccess::Rw {
        writable.push(workspace.to_owned());
    }
    let read_only: Vec<_> =
        profile.filesystem.read_only.iter().map(|e| e.path.resolve(home)).collect();
    // The innermost place that holds it decides: a read-only cache may lie in a writable home.
    let is_writable = |path: &Path| {
        path.ancestors().find_map(|above| {
            let writable = writable.iter().any(|w| w == above);
            let fixed = read_only.iter().any(|r| r == above);
            (writable || fixed).then_some(writable)
        }) == Some(true)
    };
    let real = on_host(&program).canonicalize().unwrap_or_else(|_| program.clone());
    let writable_by_exec = is_writable(&program) || is_writable(&real);
    Some(Resolved { program, found_on_path, writable_by_exec })
}
