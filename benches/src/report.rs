// SPDX-License-Identifier: GPL-2.0-only
//! Figures as a table, and against a baseline.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;

use crate::measure::Figure;

#[derive(Args)]
pub(crate) struct Options {
    /// Print one JSON array instead of the table
    #[arg(long)]
    json: bool,

    /// Figures to compare with, by kernel release
    #[arg(long, value_name = "FILE")]
    baseline: Option<PathBuf>,

    /// Make these figures the baseline of their kernels
    #[arg(long, requires = "baseline")]
    update: bool,

    /// What `measure` wrote
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

/// By kernel release, then operation.
type Baseline = BTreeMap<String, BTreeMap<String, f64>>;

/// Times and shares say something of the machine that they were taken on, and are not compared.
fn is_compared(figure: &Figure) -> bool {
    figure.unit == "instructions" || figure.unit == "bytes"
}

/// More instructions than this, as a part of the baseline's, fail.
const TOLERANCE: f64 = 0.02;

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let mut figures: Vec<Figure> = Vec::new();
    for file in &options.files {
        let read = || anyhow::Ok(serde_json::from_slice::<Vec<_>>(&fs::read(file)?)?);
        figures.extend(read().with_context(|| format!("cannot read {}", file.display()))?);
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&figures)?);
    } else {
        print!("{}", table(&figures));
    }
    let Some(path) = &options.baseline else {
        return Ok(ExitCode::SUCCESS);
    };
    let mut baseline: Baseline = match fs::read(path) {
        Ok(text) => {
            serde_json::from_slice(&text).with_context(|| format!("cannot read {}", path.display()))?
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Baseline::new(),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    if options.update {
        replace(&mut baseline, &figures);
        fs::write(path, serde_json::to_string_pretty(&baseline)? + "\n")?;
        eprintln!("{}: updated", path.display());
        return Ok(ExitCode::SUCCESS);
    }
    let verdicts = compare(&baseline, &figures);
    verdicts.iter().for_each(|verdict| eprintln!("{verdict}"));
    let worse = verdicts.iter().any(|verdict| matches!(verdict, Verdict::Worse { .. }));
    Ok(ExitCode::from(u8::from(worse)))
}

/// Identifies an operation within the figures of one kernel.
fn key(figure: &Figure) -> String {
    format!("{} cpus={} tasks={}", figure.op, figure.cpus, figure.tasks)
}

fn replace(baseline: &mut Baseline, figures: &[Figure]) {
    for figure in figures {
        baseline.remove(&figure.kernel);
    }
    for figure in figures.iter().filter(|figure| is_compared(figure)) {
        baseline.entry(figure.kernel.clone()).or_default().insert(key(figure), figure.ours);
    }
}

#[derive(Debug, PartialEq)]
enum Verdict {
    /// Neither pass nor fail.
    NoBaseline {
        kernel: String,
    },
    Same {
        kernel: String,
        figures: usize,
    },
    Worse {
        kernel: String,
        op: String,
        was: f64,
        is: f64,
    },
    /// The baseline has them, this run has not.
    Missing {
        kernel: String,
        figures: usize,
    },
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NoBaseline { kernel } => write!(f, "{kernel}: no baseline"),
            Self::Same { kernel, figures } => {
                write!(
                    f,
                    "{kernel}: {figures} figures within {}% of the baseline, or better",
                    TOLERANCE * 100.0
                )
            }
            Self::Worse { kernel, op, was, is } => {
                write!(
                    f,
                    "{kernel}: WORSE: {op}: {is}, the baseline has {was} ({:+.1}%)",
                    (is / was - 1.0) * 100.0
                )
            }
            Self::Missing { kernel, figures } => {
                write!(f, "{kernel}: {figures} figures of the baseline were not measured")
            }
        }
    }
}

fn compare(baseline: &Baseline, figures: &[Figure]) -> Vec<Verdict> {
    let mut by_kernel = BTreeMap::<_, Vec<_>>::new();
    for figure in figures.iter().filter(|figure| is_compared(figure)) {
        by_kernel.entry(&figure.kernel).or_default().push(figure);
    }
    by_kernel
        .into_iter()
        .flat_map(|(kernel, figures)| compare_kernel(baseline.get(kernel), kernel, &figures))
        .collect()
}

fn compare_kernel(
    baseline: Option<&BTreeMap<String, f64>>,
    kernel: &str,
    figures: &[&Figure],
) -> Vec<Verdict> {
    let kernel = kernel.to_owned();
    let Some(baseline) = baseline else {
        return vec![Verdict::NoBaseline { kernel }];
    };
    let now: BTreeMap<_, _> = figures.iter().map(|figure| (key(figure), figure.ours)).collect();
    let measured = baseline.iter().filter_map(|(op, &was)| Some((op, was, *now.get(op)?)));
    let (worse, same): (Vec<_>, Vec<_>) = measured.partition(|(_, was, is)| *is > was * (1.0 + TOLERANCE));
    let missing = baseline.len() - worse.len() - same.len();
    let mut verdicts = vec![Verdict::Same { kernel: kernel.clone(), figures: same.len() }];
    if missing > 0 {
        verdicts.push(Verdict::Missing { kernel: kernel.clone(), figures: missing });
    }
    let worse = worse.into_iter().map(|(op, was, is)| Verdict::Worse {
        kernel: kernel.clone(),
        op: op.clone(),
        was,
        is,
    });
    verdicts.extend(worse);
    verdicts
}

/// A line for each figure: ours, and each peer's with how many times that ours is.
fn table(figures: &[Figure]) -> String {
    let mut text = format!(
        "{:<28} {:<22} {:>4} {:>6} {:>9} {:<12}  {}\n",
        "operation", "kernel", "cpus", "tasks", "ours", "", "peers (ours is so many times that)"
    );
    for Figure { op, kernel, cpus, tasks, unit, ours, peers } in figures {
        let peers = peers.iter().map(|(name, peer)| format!("{name} {peer} ({:.2})", ours / peer));
        let peers = peers.collect::<Vec<_>>().join(", ");
        let line = format!("{op:<28} {kernel:<22} {cpus:>4} {tasks:>6} {ours:>9} {unit:<12}  {peers}");
        text += line.trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(kernel: &str, op: &str, ours: f64) -> Figure {
        let (kernel, op, unit) = (kernel.into(), op.into(), "instructions".into());
        let peers = [("floor".to_owned(), 6000.0)].into();
        Figure { op, kernel, cpus: 1, tasks: 2, unit, ours, peers }
    }

    #[test]
    fn two_percent_more_fail_and_unknown_kernels_do_not() {
        let mut baseline = Baseline::new();
        replace(&mut baseline, &[figure("6.18", "serve", 1000.0), figure("6.18", "block", 500.0)]);
        let is_worse = |figures: &[Figure]| {
            compare(&baseline, figures).iter().any(|verdict| matches!(verdict, Verdict::Worse { .. }))
        };
        assert!(!is_worse(&[figure("6.18", "serve", 1020.0), figure("6.18", "block", 100.0)]));
        assert!(is_worse(&[figure("6.18", "serve", 1021.0), figure("6.18", "block", 500.0)]));
        assert!(!is_worse(&[figure("6.18", "wake", 9999.0)]));
        assert_eq!(
            compare(&baseline, &[figure("7.3", "serve", 9999.0)]),
            [Verdict::NoBaseline { kernel: "7.3".into() }]
        );
        assert_eq!(
            compare(&baseline, &[figure("6.18", "serve", 1000.0)]),
            [
                Verdict::Same { kernel: "6.18".into(), figures: 1 },
                Verdict::Missing { kernel: "6.18".into(), figures: 1 }
            ]
        );
    }

    #[test]
    fn a_new_baseline_leaves_other_kernels_alone() {
        let mut baseline = Baseline::new();
        replace(&mut baseline, &[figure("6.18", "serve", 1000.0), figure("7.3", "serve", 900.0)]);
        replace(&mut baseline, &[figure("7.3", "block", 800.0)]);
        assert_eq!(baseline["6.18"].len(), 1);
        assert_eq!(baseline["7.3"], BTreeMap::from([("block cpus=1 tasks=2".to_owned(), 800.0)]));
    }

    #[test]
    fn the_json_has_the_contracts_fields() {
        let json = serde_json::to_value([figure("6.18", "serve", 1000.0)]).unwrap();
        let mut names: Vec<_> = json[0].as_object().unwrap().keys().cloned().collect();
        names.sort();
        assert_eq!(names, ["cpus", "kernel", "op", "ours", "peers", "tasks", "unit"]);
        assert_eq!(json[0]["peers"]["floor"], 6000.0);
    }

    #[test]
    fn the_table_has_a_line_for_each_figure_and_the_ratio_to_each_peer() {
        let text = table(&[figure("6.18", "serve", 9000.0)]);
        assert!(
            text.lines()
                .nth(1)
                .is_some_and(|line| line.contains("serve") && line.contains("floor 6000 (1.50)"))
        );
    }
}
