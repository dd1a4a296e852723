//! The request, made whole: configuration, profile, run, command and environment, read once by the
//! broker and checked before anything is decided.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::time::Duration;

use super::error::RunError;
use super::ledger::Ledger;
use crate::host::{self, Host, Places, ProfileRef, Program};
use crate::launcher::wire::{DeliverySpec, GitSpec, Prepare};
use crate::model::digest;
use crate::model::id::{ExecId, RequestId, RunId};
use crate::model::moment::{Moment, Span};
use crate::model::name::{Channel, IdentityName, VariableName};
use crate::model::run::{Run, RunState};
use crate::policy::environment::{self, Context, Given};
use crate::policy::{LeaseFlag, Reason, Request, ResolvedCommand};
use crate::profile::{Capability, NetworkMode, Profile};
use crate::source::vault::VaultKey;

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
    program: Option<Program>,
    environment: BTreeMap<OsString, OsString>,
    given: Vec<(VariableName, OsString)>,
    home: PathBuf,
}

/// The exec among those of this launcher: there is one.
pub const EXEC: u32 = 1;

pub fn set(asked: Asked) -> Result<Scene, RunError> {
    let now = crate::host::now().map_err(RunError::Clock)?;
    let host = Host::load(&asked.places)?;
    let mut profile = host.profile(&asked.profile)?;
    if let Some(mode) = asked.network {
        if mode == NetworkMode::Audience {
            return Err(RunError::WouldWiden(
                "network mode `audience` needs sublet's proxy, which this version does not have"
                    .to_owned(),
            ));
        }
        profile.narrow_network(mode).map_err(|e| RunError::WouldWiden(e.to_string()))?;
    }
    let home = host::home();
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
    let program = match requests.is_empty() {
        true => None,
        false => Program::find(&asked.command[0], &profile, &run.workspace, &home),
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
        program,
        environment,
        given,
        home,
        profile,
    })
}

impl Scene {
    /// The command as the policy judges it.
    pub fn resolved(&self) -> Option<ResolvedCommand<'_>> {
        self.program.as_ref().map(|program| program.as_command(&self.command))
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
        let program = self.program.as_ref().filter(|_| pinned).map(|p| p.path.clone());
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

    /// A managed value must not come in by the back door, as a variable or as an argument (which the
    /// trail would keep). Compared by keyed digest, so whole.
    pub fn refuse_managed_values(&self, ledger: &Ledger) -> Result<(), RunError> {
        let managed = ledger.digests()?;
        if managed.is_empty() {
            return Ok(());
        }
        let credentials = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
        let key = VaultKey::load(&self.host.state_dir, credentials.as_deref())
            .map_err(super::value::unavailable_vault)?;
        let variables =
            self.given.iter().map(|(name, value)| (format!("the value given for `{name}`"), value));
        let arguments = self.command.iter().zip(0..).map(|(a, n)| (format!("argument {n}"), a));
        for (what, value) in variables.chain(arguments) {
            if let Some(secret) = digest::matching(&key.digest(value.as_bytes()), &managed) {
                return Err(RunError::ManagedValue { what, secret: secret.clone() });
            }
        }
        Ok(())
    }
}
