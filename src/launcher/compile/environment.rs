//! An exec's variables, and what the child does with each delivery.
//!
//! Receives the order and the compiled sandbox, returns the variables without values and the child's words for the
//! deliveries. Must never take a variable of the broker's that changes whom a program is, or what it loads.
#![forbid(unsafe_code)]

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::{Compiled, c_string, invalid};
use crate::delivery::{aws_endpoint, git, ssh};
use crate::launcher::wire::{DeliverySpec, ENDPOINT_PORT, Prepare, Refusal};
use crate::model::name::Channel;
use crate::profile::names::{self, NameClass};
use crate::profile::{AWS_ENDPOINT_TOKEN, AWS_ENDPOINT_URI, NetworkMode};
use crate::sandbox::layout;
use crate::sandbox::plan::lists;

/// The first descriptor number that a memfd delivery gets.
const FIRST_DELIVERY: i64 = 3;

/// The environment but for values, and what the child does with each delivery.
pub(super) fn environment(
    prepare: &Prepare,
    sandbox: &Compiled,
) -> Result<(Vec<i64>, Vec<CString>), Refusal> {
    let Compiled { profile, home, .. } = sandbox;
    let mut variables: Vec<(String, Vec<u8>)> = Vec::new();
    let mut set = |name: &str, value: &[u8]| {
        variables.retain(|(n, _)| n != name);
        variables.push((name.to_owned(), value.to_owned()));
    };
    let path: Vec<_> =
        profile.environment.path.iter().map(|p| p.resolve(home).display().to_string()).collect();
    set("PATH", path.join(":").as_bytes());
    set("HOME", profile.filesystem.home.resolve(home).as_os_str().as_bytes());
    for (name, value) in &profile.environment.set {
        set(name.as_str(), value.as_bytes());
    }
    let has_git = prepare.deliveries.iter().any(|delivery| delivery.git.is_some());
    for (name, value) in &prepare.environment {
        // The broker's policy refuses them too; a broker that does not is not to be believed.
        let class = names::class(name.as_str());
        let is_profiles =
            || profile.environment.set.iter().any(|(n, v)| n == name && v.as_bytes() == value);
        let refused = match class {
            NameClass::Free => false,
            // The launcher has made them itself.
            NameClass::OfProfile => continue,
            NameClass::Git => has_git,
            NameClass::Loader => !is_profiles(),
            NameClass::Reserved | NameClass::Refused | NameClass::OnlyByLease => true,
        };
        if refused && let Some(why) = names::why(class) {
            return Err(invalid(
                format!("the broker cannot set `{name}`, which {why}"),
                "leave it to the profile and the deliveries",
            ));
        }
        set(name.as_str(), value);
    }

    if sandbox.layout.entries.contains_key(Path::new(layout::AGENT_SOCKET)) {
        set("SUBLET_SOCKET", layout::AGENT_SOCKET.as_bytes());
    }

    let mut handed = Vec::new();
    let mut number = FIRST_DELIVERY;
    if prepare.deliveries.iter().filter(|d| d.endpoint).count() > 1 {
        return Err(invalid(
            "an exec has one address for credentials, and two leases want it".into(),
            "lease one, or use `format = \"aws\"`",
        ));
    }
    for DeliverySpec { channel, variable, git: _, token, endpoint } in &prepare.deliveries {
        match channel {
            Channel::Memfd => {
                set(&format!("{variable}_FD"), number.to_string().as_bytes());
                handed.push(number);
                number += 1;
            }
            Channel::File => {
                let path = format!("{}/{variable}", layout::SECRETS);
                if *endpoint {
                    // Where the network is the host's, the address would be everyone's.
                    if profile.network.mode == NetworkMode::Host {
                        return Err(invalid(
                            "an address for credentials needs a network of the exec's own, and this is the host's"
                                .into(),
                            "use `format = \"aws\"`, or `[network] mode = \"none\"`",
                        ));
                    }
                    let uri = format!("http://127.0.0.1:{ENDPOINT_PORT}{}", aws_endpoint::PATH);
                    set(AWS_ENDPOINT_URI, uri.as_bytes());
                    set(AWS_ENDPOINT_TOKEN, path.as_bytes());
                } else {
                    set(&format!("{variable}_FILE"), path.as_bytes());
                }
                set("CREDENTIALS_DIRECTORY", layout::SECRETS.as_bytes());
            }
            Channel::Env => handed.push(lists::ENVIRONMENT),
            Channel::Git => {}
            Channel::Ssh => set(ssh::VARIABLE, ssh::SOCKET.as_bytes()),
            Channel::Token => {
                let Some(token) = token else {
                    return Err(invalid("a token's delivery is not described".into(), ""));
                };
                for (name, value) in &token.variables {
                    // The broker's word is taken for what an identity sets, and for nothing else.
                    if !token.kind.variables().contains(&name.as_str()) {
                        return Err(invalid(format!("no token sets `{name}`"), ""));
                    }
                    set(name, value.as_bytes());
                }
            }
        }
    }
    let gits: Vec<_> = prepare.deliveries.iter().filter_map(|d| d.git.as_ref()).collect();
    if !gits.is_empty() {
        let urls = gits.iter().map(|g| format!("{}://{}", g.protocol, g.host));
        for (name, value) in git::environment(urls) {
            set(&name, value.as_bytes());
        }
    }
    let strings = variables
        .into_iter()
        .map(|(name, value)| {
            let mut entry = name.clone().into_bytes();
            entry.push(b'=');
            entry.extend(value);
            c_string(entry, &format!("the value of {name}"))
        })
        .collect::<Result<_, _>>()?;
    Ok((handed, strings))
}
