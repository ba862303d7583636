// SPDX-License-Identifier: GPL-2.0-only
//! The layout exists three times: in the C headers, which are the truth, in the Rust mirror, and in the
//! compiled BPF object. If one differed, programs and kernel side would take each other's words for
//! something else, and no other test would say why. The contract tells it to people.

use std::any::type_name;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::mem::offset_of;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use libbpf_rs::HasSize;
use libbpf_rs::btf::types::{Array, Int, IntEncoding, MemberAttr, Struct};
use libbpf_rs::btf::{Btf, BtfType};

use shared_abi::*;

#[allow(dead_code, non_camel_case_types)] // C's names
#[path = "../src/shared_abi.rs"]
mod shared_abi;

const MIRROR: &str = include_str!("../src/shared_abi.rs");
const CONTRACT: &str = include_str!("../docs/abi.md");
const HEADERS: [&str; 2] = [include_str!("../include/umcg.h"), include_str!("../src/bpf/intf.h")];

/// What the BPF side uses. The rest of the structs is between library and loader.
const IN_BPF_OBJECT: [&str; 6] =
    ["umcg_admin_args", "umcg_call", "umcg_cell", "umcg_ctl_args", "umcg_stats", "umcg_task"];

struct Field {
    name: &'static str,
    offset: usize,
    size: usize,
    /// As Rust writes it, without the path.
    kind: &'static str,
}

struct Mirror {
    name: &'static str,
    size: usize,
    fields: Vec<Field>,
}

fn field<S, F>(name: &'static str, offset: usize, _: fn(S) -> F) -> Field {
    let kind = type_name::<F>();
    Field { name, offset, size: size_of::<F>(), kind: kind.rsplit("::").next().unwrap_or(kind) }
}

/// Lists the structs of the mirror; does not compile unless each field is named.
macro_rules! mirrors {
    ($($name:ident { $($field:ident),* $(,)? })*) => {
        fn mirrors() -> Vec<Mirror> {
            vec![$({
                let _ = |$name { $($field: _),* }: $name| ();
                Mirror {
                    name: stringify!($name),
                    size: size_of::<$name>(),
                    fields: vec![
                        $(field(stringify!($field), offset_of!($name, $field), |s: $name| s.$field)),*
                    ],
                }
            }),*]
        }
    };
}

mirrors! {
    umcg_task {
        umcg_status, umcg_server_tid, umcg_next_tid, umcg_tid, umcg_blocked_ptr, umcg_runnable_ptr,
        umcg_blocked_ts, umcg_runnable_ts, umcg_user_data, umcg_reserved,
    }
    umcg_call { timeout_ns, flags, result, reserved }
    umcg_cell { task, call }
    umcg_header { magic, abi_version, nr_slots, flags, epoch, reserved }
    umcg_hello { magic, abi_version, max_tasks, reserved }
    umcg_welcome { error, abi_version, domain, nr_slots, nonce }
    umcg_ctl_args { op, result, domain, slot, tid, flags, addr, nonce, rseq_len, rseq_sig }
    umcg_admin_args { op, result, domain, first_slot, nr_slots, reserved, nonce }
    umcg_stats {
        registrations, waits, switches, blocks, captures, preemptions, kicks, blocked_ns, runnable_ns,
        refreshes, signal_releases, rescues, sweeps,
    }
}

macro_rules! constants {
    ($($name:ident),* $(,)?) => {
        const CONSTANTS: &[(&str, u32)] = &[$((stringify!($name), $name)),*];
    };
}

constants! {
    UMCG_ABI_VERSION, UMCG_STATE_MASK, UMCG_STATE_RUNNING, UMCG_STATE_RUNNABLE, UMCG_STATE_BLOCKED,
    UMCG_STATE_NONE, UMCG_TF_PREEMPT, UMCG_TF_WAIT, UMCG_OPEN_FALLBACK, UMCG_WAIT_ENQUEUE, UMCG_MAGIC,
    UMCG_DOMAIN_PARTIAL, UMCG_CALL_NEW, UMCG_CALL_AGAIN, UMCG_CTL_ATTACH, UMCG_CTL_REGISTER, UMCG_CTL_UNREGISTER, UMCG_CTL_KICK,
    UMCG_CTL_RSEQ, UMCG_ADMIN_OPEN, UMCG_ADMIN_CLOSE,
}

/// One line a fact, for every side the same words: where they differ, an assertion shows it.
impl Mirror {
    fn lines(&self) -> Vec<String> {
        let line = |f: &Field| field_line(self.name, f.name, f.offset, f.kind);
        let mut lines: Vec<_> = self.fields.iter().map(line).collect();
        lines.push(size_line(self.name, self.size));
        lines
    }
}

fn field_line(of: &str, name: &str, offset: usize, kind: &str) -> String {
    format!("{of}.{name} at {offset}: {kind}")
}

fn size_line(of: &str, size: usize) -> String {
    format!("{of}: {size} bytes")
}

/// What follows `prefix` in each line that starts so, up to the end of the name.
fn names_after<'text>(text: &'text str, prefix: &str) -> BTreeSet<&'text str> {
    let name = |line: &'text str| {
        let rest = line.strip_prefix(prefix)?;
        rest.split(|c: char| !c.is_alphanumeric() && c != '_').next()
    };
    text.lines().filter_map(name).collect()
}

/// Names of the macros that have a value, and of the enumerators.
fn constants_of_header(header: &str) -> BTreeSet<&str> {
    let is_include_guard = |name: &str| name.ends_with("_H");
    let mut names = names_after(header, "#define ");
    names.extend(header.lines().filter_map(|line| {
        let (name, _) = line.strip_prefix('\t')?.split_once(" = ")?;
        name.starts_with("UMCG_").then_some(name)
    }));
    names.retain(|name| !is_include_guard(name));
    names
}

/// A type missing here is an error of the compiler: then the mirror needs it, too.
const C_PREAMBLE: &str = r#"
#include <stddef.h>
#include <stdio.h>
#include "src/bpf/intf.h"

#define KIND(f) _Generic((f), uint32_t: "u32", int32_t: "i32", uint64_t: "u64", \
	uint32_t *: "u32", uint64_t *: "u64", \
	struct umcg_task: "umcg_task", struct umcg_call: "umcg_call")
#define LENGTH(f) _Generic((f), uint32_t *: sizeof(f) / 4, uint64_t *: sizeof(f) / 8, default: (size_t)0)

#define FIELD(s, f) show(#s "." #f, offsetof(struct s, f), KIND(((struct s *)0)->f), \
	LENGTH(((struct s *)0)->f))
#define SIZE(s) printf(#s ": %zu bytes\n", sizeof(struct s))
#define CONSTANT(c) printf(#c " = %llu\n", (unsigned long long)(c))

static inline void show(const char *name, size_t offset, const char *kind, size_t length)
{
	if (length)
		printf("%s at %zu: [%s; %zu]\n", name, offset, kind, length);
	else
		printf("%s at %zu: %s\n", name, offset, kind);
}
"#;

/// Compiles and runs a C program of these statements; returns the lines that it prints.
fn ask_c(name: &str, statements: &str) -> Result<Vec<String>> {
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let source = program.with_extension("c");
    fs::write(&source, format!("{C_PREAMBLE}\nint main(void)\n{{\n{statements}\treturn 0;\n}}\n"))?;
    let compiler = Command::new("cc")
        .args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-I"])
        .args([env!("CARGO_MANIFEST_DIR"), "-o"])
        .args([&program, &source])
        .status()
        .context("cannot run cc; install a C compiler")?;
    ensure!(compiler.success(), "{} does not compile", source.display());
    let output = Command::new(&program).output()?;
    ensure!(output.status.success(), "{} failed", program.display());
    let text = String::from_utf8(output.stdout)?;
    Ok(text.lines().map(str::to_owned).collect())
}

#[test]
fn the_structs_are_those_of_the_headers() -> Result<()> {
    let mut statements = String::new();
    for mirror in mirrors() {
        for field in &mirror.fields {
            writeln!(statements, "\tFIELD({}, {});", mirror.name, field.name)?;
        }
        writeln!(statements, "\tSIZE({});", mirror.name)?;
    }
    let mirror: Vec<_> = mirrors().iter().flat_map(Mirror::lines).collect();
    assert_eq!(mirror, ask_c("layout_structs", &statements)?);
    Ok(())
}

/// So a field that only one side has moves another one, or the end: the comparisons see it.
#[test]
fn the_fields_fill_their_structs() {
    for mirror in mirrors() {
        let end = mirror.fields.iter().fold(0, |end, field| {
            assert_eq!(field.offset, end, "a hole before {}.{}", mirror.name, field.name);
            end + field.size
        });
        assert_eq!(end, mirror.size, "a hole at the end of {}", mirror.name);
    }
}

#[test]
fn no_struct_is_missing() {
    let compared: BTreeSet<_> = mirrors().iter().map(|mirror| mirror.name).collect();
    // All of the headers' lines that start so are definitions, but for those of functions.
    let mut in_headers = BTreeSet::new();
    for header in HEADERS {
        let definitions =
            header.lines().filter(|line| line.trim_end().ends_with('{')).collect::<Vec<_>>().join("\n");
        in_headers.extend(names_after(&definitions, "struct ").into_iter().map(str::to_owned));
    }
    assert_eq!(in_headers, compared.iter().map(|&name| name.to_owned()).collect());
    assert_eq!(names_after(MIRROR, "pub struct "), compared);
}

#[test]
fn the_constants_are_those_of_the_headers() -> Result<()> {
    let statements: String = CONSTANTS.iter().map(|(name, _)| format!("\tCONSTANT({name});\n")).collect();
    let mirror: Vec<_> = CONSTANTS.iter().map(|(name, value)| format!("{name} = {value}")).collect();
    assert_eq!(mirror, ask_c("layout_constants", &statements)?);
    Ok(())
}

#[test]
fn no_constant_is_missing() {
    let compared: BTreeSet<_> = CONSTANTS.iter().map(|&(name, _)| name).collect();
    let in_headers: BTreeSet<_> = HEADERS.into_iter().flat_map(constants_of_header).collect();
    assert_eq!(in_headers, compared);
    assert_eq!(names_after(MIRROR, "pub const "), compared);
}

/// From its table of fields, the only one whose rows start with a number.
fn lines_of_contract() -> Vec<String> {
    let field = |line: &str| {
        let cells: Vec<_> =
            line.strip_prefix('|')?.split('|').map(|cell| cell.trim().trim_matches('`')).collect();
        let name = if cells[2] == "reserved" { "umcg_reserved" } else { cells[2] };
        Some(field_line("umcg_task", name, cells[0].parse().ok()?, cells[1]))
    };
    CONTRACT.lines().filter_map(field).collect()
}

#[test]
fn the_contract_has_the_layout_of_the_header() {
    let mirror = mirrors().into_iter().find(|mirror| mirror.name == "umcg_task").expect("it is mirrored");
    let mut contract = lines_of_contract();
    contract.push(size_line("umcg_task", 64));
    assert_eq!(mirror.lines(), contract);
    assert!(CONTRACT.contains("\n64 bytes, 64-byte aligned, little-endian."));
}

/// The numbers that follow a constant's name somewhere in the contract.
fn values_in_contract(name: &str) -> BTreeSet<u32> {
    let number = |rest: &str| {
        let rest = rest.trim_start_matches('`').trim_start();
        let word = rest.split(|c: char| !c.is_alphanumeric()).next()?;
        word.strip_prefix("0x").map_or_else(|| word.parse(), |hex| u32::from_str_radix(hex, 16)).ok()
    };
    CONTRACT.split(name).skip(1).filter_map(number).collect()
}

#[test]
fn the_contract_has_the_constants_of_the_header() {
    for name in constants_of_header(HEADERS[0]) {
        let (_, value) = CONSTANTS.iter().find(|constant| constant.0 == name).expect("it is mirrored");
        if name == "UMCG_TF_WAIT" {
            assert!(CONTRACT.contains(&format!("{value:#x} is the library's own")));
        } else {
            assert_eq!(values_in_contract(name), BTreeSet::from([*value]), "{name}");
        }
    }
}

/// A type of the BPF object, as Rust writes it.
fn kind_in_btf(ty: BtfType<'_>) -> Result<String> {
    let ty = ty.skip_mods_and_typedefs();
    if let Ok(int) = Int::try_from(ty) {
        let sign = if matches!(int.encoding, IntEncoding::Signed) { 'i' } else { 'u' };
        return Ok(format!("{sign}{}", int.bits));
    }
    if let Ok(array) = Array::try_from(ty) {
        let element = kind_in_btf(array.contained_type())?;
        return Ok(format!("[{element}; {}]", array.capacity()));
    }
    match ty.name() {
        Some(name) => Ok(name.to_string_lossy().into_owned()),
        None => bail!("a field of a type without a name: {ty:?}"),
    }
}

fn lines_in_btf(btf: &Btf<'_>, name: &str, of: &Struct<'_>) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for member in of.iter() {
        let field = member.name.unwrap_or_default().to_string_lossy();
        let MemberAttr::Normal { offset: bits } = member.attr else {
            bail!("{name}.{field} is a bit field");
        };
        let ty =
            btf.type_by_id::<BtfType<'_>>(member.ty).context("BTF names a type that it does not have")?;
        lines.push(field_line(name, &field, bits as usize / 8, &kind_in_btf(ty)?));
    }
    lines.push(size_line(name, of.size()));
    Ok(lines)
}

#[test]
fn the_structs_are_those_of_the_bpf_object() -> Result<()> {
    let btf = Btf::from_path(env!("UMCG_BPF_OBJECT"))?;
    let mirrors: BTreeMap<_, _> = mirrors().into_iter().map(|m| (m.name, m)).collect();
    for name in IN_BPF_OBJECT {
        let of: Struct<'_> = btf
            .type_by_name(name)
            .with_context(|| format!("the BPF object does not describe struct {name}"))?;
        assert_eq!(mirrors[name].lines(), lines_in_btf(&btf, name, &of)?);
    }
    Ok(())
}
