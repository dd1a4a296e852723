//! `extends`, merging, and the errors. A text and a loader of texts go in, one [`Profile`] comes out.
//! The loader is the caller's: nothing is read here.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use toml::Spanned;

use crate::config::place::Located;
use crate::model::moment::Size;
use crate::model::name::VariableName;
use crate::profile::builtin;
use crate::profile::capability::Capability;
use crate::profile::kinds::{
    Enforcement, Environment, Filesystem, Landlock, Limits, Network, NetworkMode, Profile, Seccomp,
    SeccompFilter, WorkspaceAccess,
};
use crate::profile::layer::Layer;
use crate::profile::path::{BindEntry, HostPath};
use crate::profile::raw::Limit;

/// How many profiles one may be made of, itself included.
pub const MAX_DEPTH: usize = 8;

/// A profile's text could not be had. Made by the caller's loader.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("there is no profile `{name}`; there are: {known}")]
    Unknown { name: String, known: String },
    #[error("cannot read profile {}", path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("profile {} is not used: {why}", path.display())]
    Refused { path: PathBuf, why: String },
}

/// The text is no profile.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// TOML, an unknown key, a value of the wrong kind, or a rule of profiles.
    #[error(transparent)]
    Invalid(#[from] Box<Located>),
    #[error("{at}\ncannot extend `{name}`")]
    Extends { name: String, at: Box<Located>, source: LoadError },
    #[error("{at}")]
    Chain { at: Box<Located> },
}

/// Parses `text`, loads what it extends, and merges: tables key by key; scalars and lists replace; a
/// capability of the same name replaces. One that extends its own name extends the built-in one, which `load`
/// is not asked for. `name` is how messages and denials call the profile.
///
/// # Errors
/// Whatever is wrong in any of the texts, with file, line and column; a cycle or more than
/// [`MAX_DEPTH`] texts; what `load` says.
pub fn resolve(
    name: &str,
    text: &str,
    load: &mut dyn FnMut(&str) -> Result<String, LoadError>,
) -> Result<Profile, ProfileError> {
    let mut layers = vec![Layer::parse(name, text.to_owned())?];
    while let Some(layer) = layers.last()
        && let Some(extends) = &layer.extends
    {
        let parent = extends.get_ref().clone();
        let chain = || {
            let names: Vec<_> = layers.iter().map(|l| l.origin.as_str()).collect();
            format!("{} → {parent}", names.join(" → "))
        };
        let before = layers.iter().filter(|l| l.origin == parent).count();
        // A profile that takes a built-in one's place may begin with it, wherever in the chain it stands.
        let own = if before == 1 && layer.origin == parent { builtin(&parent) } else { None };
        if before > 0 && own.is_none() {
            let at =
                layer.error(extends.span(), format!("`extends` goes in a circle: {}", chain()));
            return Err(ProfileError::Chain { at });
        }
        if layers.len() == MAX_DEPTH {
            let message = format!("`extends` goes deeper than {MAX_DEPTH} profiles: {}", chain());
            return Err(ProfileError::Chain { at: layer.error(extends.span(), message) });
        }
        let text = own.map_or_else(|| load(&parent), |text| Ok(text.to_owned()));
        let text = text.map_err(|source| ProfileError::Extends {
            at: layer.error(extends.span(), "the extended profile could not be loaded"),
            name: parent.clone(),
            source,
        })?;
        layers.push(Layer::parse(&parent, text)?);
    }
    Ok(merge(name, &layers)?)
}

/// The nearest layer's word, the profile's own being the first.
fn nearest<'a, T>(layers: &'a [Layer], pick: impl Fn(&'a Layer) -> Option<T>) -> Option<T> {
    layers.iter().find_map(pick)
}

fn limit<'a, T: Copy + 'a>(
    layers: &'a [Layer],
    pick: impl Fn(&'a Layer) -> &'a Option<Limit<T>>,
) -> Option<T> {
    match nearest(layers, |l| pick(l).as_ref()) {
        Some(Limit::At(value)) => Some(*value),
        Some(Limit::None) | None => None,
    }
}

fn merge(name: &str, layers: &[Layer]) -> Result<Profile, Box<Located>> {
    let capabilities = capabilities(layers);
    let environment = environment(layers, &capabilities)?;
    Ok(Profile {
        name: name.to_owned(),
        description: nearest(layers, |l| l.description.clone()),
        filesystem: filesystem(layers)?,
        network: Network {
            mode: nearest(layers, |l| l.network.mode.as_ref())
                .map_or(NetworkMode::None, |m| *m.get_ref()),
            connect_ports: nearest(layers, |l| l.network.connect_ports.clone()),
            bind_ports: nearest(layers, |l| l.network.bind_ports.clone()),
        },
        seccomp: Seccomp {
            filter: nearest(layers, |l| l.seccomp.filter).unwrap_or(SeccompFilter::Default),
        },
        landlock: Landlock {
            enforcement: nearest(layers, |l| l.landlock.enforcement).unwrap_or(Enforcement::Strict),
            waive: nearest(layers, |l| l.landlock.waive.clone()).unwrap_or_default(),
        },
        limits: Limits {
            memory: limit(layers, |l| &l.limits.memory),
            processes: limit(layers, |l| &l.limits.processes).map(Into::into),
            cpu: limit(layers, |l| &l.limits.cpu),
            open_files: limit(layers, |l| &l.limits.open_files).map(Into::into),
            file_size: limit(layers, |l| &l.limits.file_size),
            timeout: limit(layers, |l| &l.limits.timeout),
        },
        environment,
        capabilities,
    })
}

fn plain<T: Clone>(list: &[Spanned<T>]) -> Vec<T> {
    list.iter().map(|item| item.get_ref().clone()).collect()
}

/// What is not said is the least: no path of the host, no workspace.
fn filesystem(layers: &[Layer]) -> Result<Filesystem, Box<Located>> {
    // An image takes the place of the host's directories, so it also ends what would be inherited.
    let image = layers.iter().position(|l| l.filesystem.root.is_some());
    let heirs = image.map_or(layers, |i| &layers[..=i]);
    let read_only = nearest(heirs, |l| Some((l, l.read_only.as_ref()?)));
    let read_write = nearest(heirs, |l| Some((l, l.read_write.as_ref()?)));
    let mut seen = Vec::<&HostPath>::new();
    for (layer, list) in [read_only, read_write].into_iter().flatten() {
        for at in list {
            let entry = at.get_ref();
            if seen.contains(&&entry.path) {
                let message =
                    format!("`{}` is listed twice in `read_only` and `read_write`", entry.path);
                return Err(layer.error(at.span(), message));
            }
            seen.push(&entry.path);
        }
    }
    let entries = |found: Option<(&Layer, &Vec<Spanned<BindEntry>>)>| {
        found.map(|(_, list)| plain(list)).unwrap_or_default()
    };
    Ok(Filesystem {
        read_only: entries(read_only),
        read_write: entries(read_write),
        workspace: nearest(layers, |l| l.filesystem.workspace).unwrap_or(WorkspaceAccess::None),
        tmp: nearest(layers, |l| l.filesystem.tmp).unwrap_or(Size(64 << 20)),
        home: nearest(layers, |l| l.filesystem.home.as_ref())
            .map_or_else(|| HostPath::Absolute("/tmp/home".into()), |home| home.get_ref().clone()),
        root: nearest(layers, |l| l.filesystem.root.as_ref()).map(|root| root.get_ref().clone()),
    })
}

fn environment(
    layers: &[Layer],
    capabilities: &[Arc<Capability>],
) -> Result<Environment, Box<Located>> {
    let delivered: Vec<(VariableName, &Capability)> = capabilities
        .iter()
        .flat_map(|c| c.delivered_variables().map(move |variable| (variable, &**c)))
        .collect();
    let taken = |layer: &Layer, name: &VariableName, span| match delivered
        .iter()
        .find(|(v, _)| v == name)
    {
        Some((_, by)) => Err(layer.error(
            span,
            format!(
                "`{name}` is delivered by capability `{}`, so the profile cannot also set it",
                by.name
            ),
        )),
        None => Ok(()),
    };
    let mut set = BTreeMap::<&VariableName, (&Layer, &Spanned<String>)>::new();
    for layer in layers.iter().rev() {
        set.extend(layer.set.iter().map(|(name, value)| (name, (layer, value))));
    }
    for (name, (layer, value)) in &set {
        taken(layer, name, value.span())?;
    }
    let pass = nearest(layers, |l| Some((l, l.pass.as_ref()?)));
    if let Some((layer, pass)) = pass {
        for name in pass {
            taken(layer, name.get_ref(), name.span())?;
        }
    }
    Ok(Environment {
        set: set.into_iter().map(|(name, (_, v))| (name.clone(), v.get_ref().clone())).collect(),
        pass: pass.map(|(_, pass)| plain(pass)).unwrap_or_default(),
        path: nearest(layers, |l| l.path.as_ref()).map_or_else(
            || ["/usr/local/bin", "/usr/bin", "/bin"].map(|p| HostPath::Absolute(p.into())).into(),
            |path| plain(path),
        ),
    })
}

fn capabilities(layers: &[Layer]) -> Vec<Arc<Capability>> {
    let mut merged = Vec::<Arc<Capability>>::new();
    for capability in layers.iter().rev().flat_map(|l| &l.capabilities) {
        match merged.iter_mut().find(|c| c.name == capability.name) {
            Some(earlier) => *earlier = Arc::clone(capability),
            None => merged.push(Arc::clone(capability)),
        }
    }
    merged
}
