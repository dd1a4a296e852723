use std::collections::HashMap;
use std::path::Path;
use std::time::Instant;

use super::*;
use crate::model::moment::{Size, Span};
use crate::model::name::Channel;

fn from(text: &str) -> Result<Profile, ProfileError> {
    resolve("p.toml", text, &mut load_builtin)
}

fn among(texts: &[(&str, &str)]) -> Result<Profile, ProfileError> {
    let texts: HashMap<_, _> = texts.iter().copied().collect();
    resolve("top", texts["top"], &mut |name| {
        texts
            .get(name)
            .map(|t| (*t).to_owned())
            .ok_or_else(|| LoadError::Unknown { name: name.to_owned(), known: "none".into() })
    })
}

const PUSH: &str = r#"
[[capability]]
name = "repo.push"
channels = ["git", "env"]
command = [["git", "push", "**"]]
[[capability.audience]]
protocol = "https"
host = "github.com"
secret = "github-bot"
"#;

/// The text is refused, and the error has every part of `expected`.
#[track_caller]
fn refused(text: &str, expected: &[&str]) {
    let e = from(text).expect_err("accepted").to_string();
    for part in expected {
        assert!(e.contains(part), "no {part:?} in:\n{e}");
    }
}

#[test]
fn every_builtin_profile_resolves_and_has_what_it_promises() {
    for name in builtin_names() {
        let text = builtin(name).unwrap();
        assert!(text.starts_with("# For "), "{name} must open with whom it is for");
        let profile = resolve(name, text, &mut load_builtin).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(profile.name, name);
        assert_eq!(profile.landlock.enforcement, Enforcement::Strict);
        assert!(profile.landlock.waive.is_empty() && profile.filesystem.read_write.is_empty());
        assert_eq!(profile.network.mode == NetworkMode::Host, name == "git-push");
        assert_eq!(profile.filesystem.workspace == WorkspaceAccess::Ro, name == "strict");
        assert_eq!(profile.environment.set[&"LANG".parse().unwrap()], "C.UTF-8");
    }
    assert!(builtin("nope").is_none());
    let push = from("extends = \"git-push\"").unwrap();
    let capability = push.capability(&"repo.push".parse().unwrap()).unwrap();
    let audience = capability.audience(&"github.com".parse().unwrap()).unwrap();
    assert_eq!(audience.git_username(), "x-access-token");
    assert_eq!(audience.path.as_ref().unwrap().as_str(), "acme/insights.git");
    assert!(!capability.is_any_command());
}

#[test]
fn no_builtin_profile_shows_where_keys_are_kept() {
    let home = Path::new("/home/a");
    for name in builtin_names() {
        let profile = resolve(name, builtin(name).unwrap(), &mut load_builtin).unwrap();
        for entry in &profile.filesystem.read_only {
            let shown = entry.path.resolve(home);
            for key in [
                "/home/a/.ssh",
                "/home/a/.netrc",
                "/home/a/.npmrc",
                "/home/a/.cargo/credentials.toml",
                "/home/a/.cargo/config.toml",
                "/home/a/.m2/settings.xml",
                "/home/a/.aws",
                "/etc/shadow",
                "/etc/ssl/private",
                "/etc/pki/tls/private",
                "/etc/sublet",
                "/var/lib/sublet",
                "/root",
                "/run",
                "/sys",
            ] {
                assert!(!Path::new(key).starts_with(&shown), "{name}: {entry} shows {key}");
            }
        }
    }
}

#[test]
fn tables_merge_key_by_key_and_the_rest_replaces() {
    let p = among(&[
        ("base", "description = \"base\"\n[filesystem]\nread_only = [\"/usr\", \"/bin\"]\ntmp = \"1M\"\nworkspace = \"rw\"\n\
                  [limits]\nmemory = \"1G\"\ncpu = 2\ntimeout = \"5m\"\n[environment]\nset = { A = \"1\", B = \"1\" }\npass = [\"X\"]\n"),
        ("mid", "extends = \"base\"\n[filesystem]\ntmp = \"2M\"\n[environment.set]\nB = \"2\"\nC = \"2\"\n"),
        ("top", "extends = \"mid\"\n[filesystem]\nread_only = [\"/opt\"]\n[limits]\ncpu = \"none\"\n[environment]\npass = []\n"),
    ])
    .unwrap();
    assert_eq!(p.description.as_deref(), Some("base"));
    assert_eq!(p.filesystem.read_only, ["/opt".parse().unwrap()]);
    assert_eq!((p.filesystem.tmp, p.filesystem.workspace), (Size(2 << 20), WorkspaceAccess::Rw));
    assert_eq!((p.limits.memory, p.limits.cpu), (Some(Size(1 << 30)), None));
    assert_eq!(p.limits.timeout, Some(Span::seconds(300)));
    let set: Vec<_> = p.environment.set.iter().map(|(n, v)| format!("{n}={v}")).collect();
    assert_eq!(set, ["A=1", "B=2", "C=2"]);
    assert!(p.environment.pass.is_empty());
}

#[test]
fn a_capability_of_the_same_name_replaces_whole() {
    let base = format!(
        "{PUSH}username = \"bot\"\n[[capability]]\nname = \"a\"\nchannels = [\"memfd\"]\ncommand = [[\"**\"]]\n\
                        [[capability.audience]]\nhost = \"h\"\nsecret = \"s\"\n"
    );
    let top = format!("extends = \"base\"\n{PUSH}");
    let p = among(&[("base", &base), ("top", &top)]).unwrap();
    let names: Vec<_> = p.capabilities.iter().map(|c| c.name.as_str()).collect();
    assert_eq!(names, ["repo.push", "a"]);
    assert!(p.capabilities[0].audiences[0].username.is_none());
}

#[test]
fn what_takes_a_built_in_ones_place_may_begin_with_it() {
    for name in builtin_names() {
        let ours = "extends = \"NAME\"\ndescription = \"ours\"".replace("NAME", name);
        // By its own name, and as what another extends.
        let site = |wanted: &str| match wanted == name {
            true => Ok(ours.clone()),
            false => load_builtin(wanted),
        };
        let plain = resolve(name, builtin(name).unwrap(), &mut load_builtin).unwrap();
        let own = resolve(name, &ours, &mut |wanted| site(wanted));
        let above = resolve("top", &format!("extends = \"{name}\""), &mut |wanted| site(wanted));
        for found in [own, above] {
            let found = found.unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(found.description.as_deref(), Some("ours"));
            assert_eq!(
                (found.filesystem, found.limits),
                (plain.filesystem.clone(), plain.limits.clone())
            );
        }
    }
}

#[test]
fn circles_and_depth_are_named() {
    let e =
        among(&[("top", "extends = \"a\""), ("a", "extends = \"b\""), ("b", "extends = \"a\"")]);
    let e = e.unwrap_err().to_string();
    assert!(e.starts_with("b:1:11:") && e.contains("top → a → b → a"), "{e}");
    assert!(among(&[("top", "extends = \"top\"")]).is_err());
    // Their own names lead to the built-in ones, and no further.
    let e = among(&[("top", "extends = \"build\""), ("build", "extends = \"top\"")]);
    assert!(e.unwrap_err().to_string().contains("top → build → top"));
    let e = among(&[
        ("top", "extends = \"git-push\""),
        ("git-push", "extends = \"git-push\""),
        ("default", "extends = \"git-push\""),
    ]);
    assert!(e.unwrap_err().to_string().contains("git-push → git-push → default → git-push"));

    let chain = |n: usize| {
        resolve("0", "extends = \"1\"", &mut |name| {
            let i: usize = name.parse().unwrap();
            Ok(if i + 1 < n { format!("extends = \"{}\"", i + 1) } else { String::new() })
        })
    };
    assert!(chain(MAX_DEPTH).is_ok());
    assert!(chain(MAX_DEPTH + 1).unwrap_err().to_string().contains("deeper than 8"));

    let e = from("extends = \"nope\"").unwrap_err();
    assert!(e.to_string().contains("p.toml:1:11"), "{e}");
    let source = std::error::Error::source(&e).unwrap().to_string();
    assert!(source.contains("default, strict, build, git-push"), "{source}");
}

#[test]
fn what_is_wrong_is_said_with_its_place() {
    refused("x = 1", &["p.toml:1:1", "unknown field `x`", "filesystem"]);
    refused("[filesystem]\n reed_only = []", &["p.toml:2:2", "reed_only", "read_only"]);
    refused("[limits\n", &["p.toml:1:"]);
    refused("[limits]\nmemory = \"2GB\"", &["p.toml:2:10", "2GB", "powers of 1024"]);
    refused("[limits]\nmemory = 0", &["p.toml:2:10"]);
    refused("[limits]\nprocesses = 0", &["p.toml:2:13"]);
    refused("[limits]\ncpu = 0", &["p.toml:2:7", "0.01 to 4096"]);
    refused("[limits]\ncpu = nan", &["p.toml:2:7"]);
    refused("[limits]\ntimeout = \"soon\"", &["p.toml:2:11", "soon"]);
    refused("[filesystem]\nread_only = [\"/usr\", \"../x\"]", &["p.toml:2:22", "not absolute"]);
    refused("[filesystem]\nread_only = [\"/usr\", \"-/usr\"]", &["p.toml:2:22", "listed twice"]);
    refused("[filesystem]\nread_only = [\"/a\"]\nread_write = [\"/a\"]", &["p.toml:3:15", "twice"]);
    refused("[filesystem]\nworkspace = \"rx\"", &["p.toml:2:13", "rw"]);
    refused("[filesystem]\nhome = \"/usr/home\"", &["p.toml:2:8", "/tmp/home"]);
    refused("[filesystem]\nroot = \"~/img\"", &["p.toml:2:8"]);
    refused("[network]\nmode = \"audience\"", &["p.toml:2:8", "proxy", "connect_ports"]);
    refused("[network]\nconnect_ports = [70000]", &["p.toml:2:18"]);
    refused("[seccomp]\nfilter = \"none\"", &["p.toml:2:10", "default"]);
    refused(
        "[landlock]\nwaive = [\"scope\", \"everything\"]",
        &["p.toml:2:19", "everything", "scope"],
    );
    refused("[environment.set]\nPATH = \"/x\"", &["p.toml:2:8", "environment.path"]);
    refused("[environment.set]\nSUBLET_SOCKET = \"/x\"", &["reserved"]);
    refused("[environment.set]\nAWS_SECRET_ACCESS_KEY = \"x\"", &["only a lease"]);
    refused("[environment.set]\n\"a-b\" = \"x\"", &["p.toml:2:1", "a-b"]);
    refused("[environment]\npass = [\"LD_PRELOAD\"]", &["p.toml:2:9", "environment.set"]);
    refused("[environment]\npath = []", &["p.toml:2:8"]);
    refused("[environment]\npath = [\"/a:/b\"]", &["`:`"]);
    from("[environment.set]\nLD_LIBRARY_PATH = \"/opt/lib\"\nGIT_AUTHOR_NAME = \"bot\"").unwrap();
    from("[landlock]\nenforcement = \"best-effort\"\nwaive = [\"scope\", \"ioctl\"]").unwrap();
    from("[limits]\nmemory = 1048576\ntimeout = 90\ncpu = 0.5\nprocesses = \"none\"").unwrap();
}

#[test]
fn a_capability_must_be_able_to_deliver() {
    from(PUSH).unwrap_or_else(|e| panic!("{e}"));
    #[track_caller]
    fn without(part: &str, with: &str, expected: &[&str]) {
        assert!(PUSH.contains(part));
        refused(&PUSH.replace(part, with), expected);
    }
    without(
        "command = [[\"git\", \"push\", \"**\"]]",
        "",
        &["p.toml:2:1", "no `command`", "[[\"**\"]]"],
    );
    without("[[\"git\", \"push\", \"**\"]]", "[]", &["no `command`"]);
    without("[[\"git\", \"push\", \"**\"]]", "[[]]", &["p.toml:5:12", "empty"]);
    without("[[\"git\", \"push\", \"**\"]]", "[\"git\"]", &["p.toml:5:12", "list of words"]);
    without("\"**\"", "\"**\", \"x\"", &["p.toml:5:12", "last"]);
    without("[\"git\", \"env\"]", "[]", &["no `channels`"]);
    without("[\"git\", \"env\"]", "[\"git\", \"git\"]", &["p.toml:4:12", "twice"]);
    without("[\"git\", \"env\"]", "[\"fax\"]", &["p.toml:4:13", "memfd"]);
    without("protocol = \"https\"", "", &["p.toml:6:1", "protocol = \"https\""]);
    without("protocol = \"https\"", "protocol = \"ssh\"", &["p.toml:7:12", "speaks HTTP"]);
    without("host = \"github.com\"", "host = \"GitHub.com\"", &["p.toml:8:8", "lower case"]);
    without("secret = \"github-bot\"", "", &["has no `secret`"]);
    without(
        "secret = \"github-bot\"",
        "secret = \"1password\"",
        &["p.toml:9:10", "add a `variable`"],
    );
    without(
        "secret = \"github-bot\"",
        "secret = \"s\"\nvariable = \"SUBLET_X\"",
        &["p.toml:10:12", "reserved"],
    );
    without(
        "secret = \"github-bot\"",
        "secret = \"s\"\nvariable = \"AZURE_CLIENT_SECRET\"",
        &["long-lived"],
    );
    without(
        "secret = \"github-bot\"",
        "secret = \"s\"\nvariable = \"LD_PRELOAD\"",
        &["LD_PRELOAD"],
    );
    without(
        "secret = \"github-bot\"",
        "secret = \"s\"\nvariable = \"PATH\"",
        &["environment.path"],
    );
    without("secret = \"github-bot\"", "secret = \"s\"\npath = \"../x\"", &["p.toml:10:8"]);
    without("secret = \"github-bot\"", "secret = \"s\"\nusername = \"a\\nb\"", &["p.toml:10:12"]);
    refused(
        &format!(
            "{PUSH}[[capability.audience]]\nprotocol=\"https\"\nhost=\"github.com\"\nsecret=\"s\""
        ),
        &["p.toml:12:6", "twice"],
    );
    refused(&format!("{PUSH}{PUSH}"), &["p.toml:12:8", "declared twice"]);
    let header = "[[capability]]\nname = \"a\"\nchannels = [\"memfd\"]\ncommand = [[\"**\"]]\n";
    refused(header, &["p.toml:1:1", "no `audience`"]);
    let audience = "[[capability.audience]]\nhost = \"h\"\nsecret = \"s\"\n";
    for uses in ["0", "-1", "4294967296"] {
        refused(&format!("{header}uses = {uses}\n{audience}"), &["p.toml:5:8", "1 to 4294967295"]);
    }
    from(&format!("{header}uses = 7\n{audience}")).unwrap();
    // A derived name is needed only where a channel uses it.
    from(&PUSH.replace("\"git\", \"env\"", "\"git\"").replace("github-bot", "1password")).unwrap();
}

#[test]
fn a_delivered_variable_cannot_be_set_or_passed() {
    refused(
        &format!("[environment.set]\nGITHUB_BOT = \"x\"\n{PUSH}"),
        &["p.toml:2:14", "repo.push"],
    );
    refused(
        &format!("[environment]\npass = [\"GITHUB_BOT\"]\n{PUSH}"),
        &["p.toml:2:9", "repo.push"],
    );
    from(&format!("[environment]\npass = [\"GITHUB_BOT_FD\"]\n{PUSH}")).unwrap();
    let base = "[environment.set]\nGITHUB_BOT = \"x\"\n";
    let e = among(&[("base", base), ("top", &format!("extends = \"base\"\n{PUSH}"))]).unwrap_err();
    assert!(e.to_string().starts_with("base:2:14"), "{e}");
}

#[test]
fn where_each_channel_puts_a_value() {
    let p = from(PUSH).unwrap();
    let audience = &p.capabilities[0].audiences[0];
    let variable = |c| audience.place(c).unwrap().variable().map(ToString::to_string);
    assert_eq!(variable(Channel::Env).as_deref(), Some("GITHUB_BOT"));
    assert_eq!(variable(Channel::File).as_deref(), Some("GITHUB_BOT_FILE"));
    assert_eq!(variable(Channel::Memfd).as_deref(), Some("GITHUB_BOT_FD"));
    assert_eq!(variable(Channel::Git), None);
    let Some(Place::File { path, .. }) = audience.place(Channel::File) else { panic!() };
    assert_eq!(path, Path::new("/run/sublet/secrets/GITHUB_BOT"));
}

#[test]
fn an_image_ends_the_hosts_directories() {
    let p = from("extends = \"default\"\n[filesystem]\nroot = \"/srv/image\"").unwrap();
    assert!(p.filesystem.read_only.is_empty());
    let p =
        from("extends = \"default\"\n[filesystem]\nroot = \"/srv/image\"\nread_only = [\"/opt\"]")
            .unwrap();
    assert_eq!(p.filesystem.read_only.len(), 1);
}

#[test]
fn the_network_is_narrowed_never_widened() {
    let mut p = from("extends = \"git-push\"").unwrap();
    p.narrow_network(NetworkMode::None).unwrap();
    assert_eq!(p.network.mode, NetworkMode::None);
    let e = p.narrow_network(NetworkMode::Host).unwrap_err();
    assert!(e.to_string().contains("p.toml"), "{e}");
}

#[test]
fn a_resolved_profile_written_as_toml_is_the_same_profile() {
    for name in builtin_names() {
        let mut profile = resolve(name, builtin(name).unwrap(), &mut load_builtin).unwrap();
        let text = toml::to_string(&profile).unwrap();
        let again = resolve("again", &text, &mut load_builtin).unwrap_or_else(|e| panic!("{e}"));
        profile.name = "again".into();
        assert_eq!(again, profile, "{text}");
    }
}

/// The documented example, word for word.
const EXAMPLE: &str = r#"
description = "Push to the team's repository"
extends = "default"
[filesystem]
read_only = ["/usr", "/bin", "/lib", "/lib64", "/etc/ssl"]
workspace = "rw"              # rw | ro | none
tmp = "64M"
# root = "/var/lib/images/agent"   # an image instead of the host's directories
[network]
mode = "none"                 # none | audience (only the leases' audiences, through sublet's proxy) | host
[seccomp]
filter = "default"            # seccomp/default.json
[landlock]
enforcement = "strict"        # strict | best-effort; waive = ["scope"] names what may be missing
[limits]
memory = "2G"
processes = 256
cpu = 2.0
open_files = 1024
# timeout = "10m"             # none by default
[environment]
set = { LANG = "C.UTF-8" }
pass = ["TERM"]
[[capability]]
name = "repo.push"
permission = "repo:write"     # the principal must hold it
channels = ["git"]
ttl = "10m"                   # the most that may be asked for
uses = 5                      # the most that may be asked for
renewable = false             # true: up to max_ttl in all
command = [["git", "push", "**"]]  # mandatory
redact = true                 # the default; masks values of 8 bytes and more
on_revoke = "kill"            # or "wipe"
constraints = { action = "push", resource = "acme/insights" }  # carried by the envelope
[[capability.audience]]
protocol = "https"
host = "github.com"           # host or host:port
path = "acme/insights.git"    # optional, git
secret = "github-bot"
username = "x-access-token"   # git channel
variable = "GITHUB_TOKEN"     # env channel; file and memfd use it with _FILE and _FD
"#;

#[test]
fn the_documented_example_is_a_profile() {
    let profile = from(EXAMPLE).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(profile.capabilities[0].constraints["resource"], "acme/insights");
}

#[test]
fn a_text_with_a_character_missing_never_panics() {
    for (i, c) in EXAMPLE.char_indices() {
        let text = format!("{}{}", &EXAMPLE[..i], &EXAMPLE[i + c.len_utf8()..]);
        if let Err(e) = from(&text) {
            assert!(e.to_string().contains("p.toml:"), "{e}");
        }
    }
}

/// Prints what resolving costs: `cargo test --release --lib resolving_costs -- --nocapture`.
#[test]
fn resolving_costs() {
    let text = builtin("git-push").unwrap();
    let rounds = 200;
    let begin = Instant::now();
    for _ in 0..rounds {
        std::hint::black_box(resolve("git-push", text, &mut load_builtin).unwrap());
    }
    eprintln!("default + git-push: {} ns", begin.elapsed().as_nanos() / rounds);
}
