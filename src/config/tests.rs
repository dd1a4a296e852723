use super::*;

fn from(text: &str) -> Result<HostConfig, Box<Located>> {
    HostConfig::parse(text, "sublet.toml")
}

#[track_caller]
fn refused(text: &str, expected: &[&str]) {
    let e = from(text).expect_err("accepted").to_string();
    for part in expected {
        assert!(e.contains(part), "no {part:?} in:\n{e}");
    }
}

#[test]
fn the_starter_says_the_defaults_and_its_examples_parse() {
    let written = HostConfig { origin: None, ..from(STARTER).unwrap() };
    assert_eq!(written, HostConfig::default());

    let setting = |line: &str| line.starts_with('#') && !line.starts_with("# ") && line != "#";
    let live: String = STARTER
        .lines()
        .map(|line| format!("{}\n", if setting(line) { &line[1..] } else { line }))
        .collect();
    let config = from(&live).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(config.ceilings, Ceilings::default());
    assert_eq!(config.leases, Leases::default());
    assert_eq!(config.host.uid_pool, UidPool::default());
    assert_eq!(config.secrets.len(), 5);
    assert_eq!(config.permissions_of(&"alice".parse().unwrap())[0].as_str(), "repo:write");
    assert!(config.permissions_of(&"bob".parse().unwrap()).is_empty());
}

#[test]
fn sources_are_typed_and_allow_is_mandatory() {
    let config = from(
        "[secrets.a]\nsource = \"command\"\ncommand = [\"/bin/mint\", \"x\"]\nallow = [\"a@h\"]\n\
         [secrets.b]\nsource = \"file\"\npath = \"/k\"\nallow = [\"b@h\", \"c@h\"]\n",
    )
    .unwrap();
    let a = &config.secrets[&"a".parse().unwrap()];
    let command = vec!["/bin/mint".to_owned(), "x".to_owned()];
    assert_eq!(a.source, SecretSource::Command { command, timeout: Span::seconds(10) });
    let b = &config.secrets[&"b".parse().unwrap()];
    assert!(b.allows(&"c".parse().unwrap(), &"h".parse().unwrap()));
    assert!(!b.allows(&"a".parse().unwrap(), &"h".parse().unwrap()));

    refused(
        "[secrets.a]\nsource = \"vault\"",
        &["sublet.toml:1:1", "no `allow`", "repo.push@github.com"],
    );
    refused("[secrets.a]\nsource = \"vault\"\nallow = []", &["empty `allow`", "none names it"]);
    refused(
        "[secrets.a]\nsource = \"vault\"\nallow = [\"a@h\", \"nonsense\"]",
        &["sublet.toml:3:17", "capability@audience"],
    );
    refused("[secrets.a]\nallow = [\"a@h\"]", &["missing field `source`"]);
    refused("[secrets.a]\nsource = \"fault\"\nallow = [\"a@h\"]", &["sublet.toml:2:10", "vault"]);
    refused("[secrets.a]\nsource = \"file\"\nallow = [\"a@h\"]", &["needs `path"]);
    refused(
        "[secrets.a]\nsource = \"file\"\npath = \"k\"\nallow = [\"a@h\"]",
        &["sublet.toml:3:8", "absolute"],
    );
    refused(
        "[secrets.a]\nsource = \"vault\"\npath = \"/k\"\nallow = [\"a@h\"]",
        &["sublet.toml:3:8", "no meaning"],
    );
    refused(
        "[secrets.a]\nsource = \"file\"\npath = \"/k\"\ntimeout = 3\nallow = [\"a@h\"]",
        &["no meaning"],
    );
    refused("[secrets.a]\nsource = \"command\"\nallow = [\"a@h\"]", &["needs `command"]);
    refused(
        "[secrets.a]\nsource = \"command\"\ncommand = [\"mint\"]\nallow = [\"a@h\"]",
        &["sublet.toml:3:11", "no shell"],
    );
    refused(
        "[secrets.\"a b\"]\nsource = \"vault\"\nallow = [\"a@h\"]",
        &["sublet.toml:1:", "secret name"],
    );
}

#[test]
fn what_is_wrong_is_said_with_its_place() {
    refused("[stat]\n", &["sublet.toml:1:2", "stat", "state"]);
    refused("[ceilings]\nrequests_per_minute = 0", &["sublet.toml:2:23"]);
    refused("[leases]\ndefault_ttl = \"2h\"", &["sublet.toml:2:15", "max_ttl", "1h"]);
    refused("[leases]\ndefault_ttl = \"2 hours\"", &["sublet.toml:2:15"]);
    refused("[principals.alice]\npermission = [\"x\"]", &["sublet.toml:2:1", "permissions"]);
    refused("[principals.alice]\npermissions = [\"a b\"]", &["sublet.toml:2:"]);
    refused("[state]\ndir = \"state\"", &["sublet.toml:2:7", "absolute"]);
    refused("[state]\ndir = \"/\"", &["sublet.toml:2:7"]);
    refused("[host]\nworkspaces = [\"/srv\", \"/srv/../etc\"]", &["sublet.toml:2:23", "`..`"]);
    refused("[host]\nuser = \"root\"", &["sublet.toml:2:8", "must not be root"]);
    refused("[host]\nuid_pool = \"0:10\"", &["sublet.toml:2:12", "below 1000"]);
    refused("[host]\nwarm = 257", &["sublet.toml:2:8", "at most 256"]);
    assert_eq!(from("[host]\nwarm = 4").unwrap().host.warm, Warm(4));
    let config = from("[leases]\nmax_ttl = \"1m\"\n[host]\nuid_pool = \"100000:65536\"").unwrap();
    assert_eq!(config.leases.default_ttl, Span::seconds(60));
}

#[test]
fn postgres_is_refused_by_name_and_its_password_not_shown() {
    let e = from("[state]\nurl = \"postgresql://u:hunter2@db/sublet\"").unwrap_err().to_string();
    assert!(e.contains("`state.url` names PostgreSQL") && e.contains("sublet.toml:2:7"), "{e}");
    assert!(!e.contains("hunter2"), "{e}");
    let e = from("[secrets.a]\nsource = \"vault\"\nvalue = \"hunter2\"").unwrap_err().to_string();
    assert!(e.contains("value") && !e.contains("hunter2"), "{e}");
}

#[test]
fn pools_of_uids() {
    #[track_caller]
    fn check(text: &str, expected: Option<(u32, u32)>) {
        let found = text.parse::<UidPool>().ok().map(|p| (p.first, p.count.get()));
        assert_eq!(found, expected, "{text:?}");
    }
    check("1879048192:65536", Some((1_879_048_192, 65_536)));
    check("1000:64534", Some((1000, 64_534)));
    for bad in [
        "",
        "1000",
        "1000:",
        ":5",
        "1000:0",
        "999:5",
        "1000:64535",
        "65534:1",
        "4294967295:1",
        "4294967290:6",
        "+1000:5",
        "1000:5:5",
        "a:b",
    ] {
        check(bad, None);
    }
    let pool: UidPool = "1000:2".parse().unwrap();
    assert_eq!((pool.exec_uids(), pool.broker_uid()), (1, 1001));
    assert!(!pool.contains(999) && pool.contains(1001) && !pool.contains(1002));
}

/// A source of each kind that mints, drawing on the secret `k`.
fn minted(kind: &str) -> String {
    format!("[secrets.k]\nsource = \"vault\"\nallow = []\n[secrets.a]\nallow = [\"a@h\"]\n{kind}")
}

#[test]
fn sources_that_mint_are_typed() {
    const OAUTH: &str = "source = \"oauth\"\ntoken_url = \"https://l.test/t\"\nclient_id = \"c\"\n";
    const GITHUB: &str = "source = \"github-app\"\napp_id = 7\nprivate_key = \"k\"\n";
    const VAULT: &str = "source = \"vault-server\"\nurl = \"https://v.test\"\nauth = \"token\"\ntoken = \"k\"\nmount = \"m\"\n";
    const STS: &str = "source = \"aws-sts\"\nregion = \"eu-1\"\nrole_arn = \"arn:x\"\n";
    let good = |kind: String| from(&minted(&kind)).unwrap_or_else(|e| panic!("{kind}: {e}"));
    let config = good(format!("{OAUTH}client_secret = \"k\"\ntimeout = \"3s\""));
    let SecretSource::Minted(minted_source) = &config.secrets[&"a".parse().unwrap()].source else {
        panic!()
    };
    assert_eq!(minted_source.timeout, std::time::Duration::from_secs(3));
    assert_eq!(minted_source.kind.urls()[0].to_string(), "https://l.test/t");
    good(format!("{GITHUB}permissions = {{ contents = \"read\" }}"));
    good(format!("{VAULT}engine = \"kv-v2\"\npath = \"a/b\""));
    good(format!("{STS}access_key = \"k\"\npolicy = '{{}}'"));

    #[track_caller]
    fn bad(kind: String, words: &[&str]) {
        refused(&minted(&kind), words);
    }
    bad(OAUTH.to_owned(), &["client_secret"]);
    bad(format!("{OAUTH}client_secret = \"nobody\""), &["there is no [secrets.nobody]"]);
    bad(
        format!("{OAUTH}client_secret = \"k\"\npath = \"/k\""),
        &["sublet.toml:10:8", "no meaning"],
    );
    bad(format!("{OAUTH}client_secret = \"k\"\ntimeout = \"1h\""), &["at most 2m"]);
    bad(format!("{OAUTH}client_secret = \"a\""), &["whose source is `oauth`"]);
    bad(OAUTH.replace("https://l.test", "http://l.test"), &["must be `https`"]);
    bad(GITHUB.to_owned(), &["needs `permissions"]);
    bad(format!("{GITHUB}permissions = {{ contents = \"all\" }}"), &["read, write or admin"]);
    bad(format!("{VAULT}engine = \"kv-v2\"\npath = \"a/../b\""), &["`path`"]);
    bad(format!("{VAULT}engine = \"kv\"\npath = \"a\""), &["`kv-v1`"]);
    bad(format!("{STS}policy = '{{}}'"), &["`access_key` or `web_identity_token`"]);
    bad(format!("{STS}access_key = \"k\"\npolicy = 'x'"), &["no JSON"]);
    let leak = OAUTH.replace("https://", "https://u:hunter2@");
    let e = from(&minted(&leak)).unwrap_err().to_string();
    assert!(e.contains("no user name") && !e.contains("hunter2"), "{e}");
}

#[test]
fn the_documented_example_is_a_configuration() {
    let config = from(
        r#"
[state]                       # embedded SQLite unless url names PostgreSQL
dir = "/var/lib/sublet"
[host]
workspaces = ["/srv/agents"]  # where `serve` may take workspaces from; sublet run takes the invoker's
user = "sublet"               # the broker's
uid_pool = "1879048192:65536" # first uid and count for execs
[ceilings]                    # per run
requests_per_minute = 20
requests_per_run = 500
[leases]
default_ttl = "5m"
max_ttl = "1h"
auto_renew = true
renew_before_expiry = "1m"
[principals.alice]
permissions = ["repo:write"]
[secrets.github-bot]          # a named source
source = "vault"              # value set once with `sublet secret set github-bot`
allow = ["repo.push@github.com"]   # mandatory: the capability@audience pairs that may draw on it
[secrets.deploy]
source = "command"            # prints the AWS credential_process JSON, or {"value","expires_at"}
command = ["/usr/local/bin/mint-deploy-key"]
allow = ["deploy.*@*.example.com"]
[secrets.readonly-key]
source = "file"
path = "/etc/keys/readonly"
allow = ["db.read@db.internal:5432"]
"#,
    )
    .unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(config.secrets.len(), 3);
}
